"""The one place that imports DeepSpeed."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch


def initialise(
    module: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    *,
    batch_size: int,
    zero_stage: int,
    accumulate: int = 1,
) -> Any:
    """A DeepSpeed engine over ``module`` for the current process group.

    ``batch_size`` is per worker and backward pass; ``accumulate`` backward passes make one step of the optimiser.

    DeepSpeed's shared-memory collective is switched off: it compiles for 80-150 s at first use and only speeds up
    reductions of large CPU tensors, where gloo does for ours.
    """
    warnings.filterwarnings("ignore")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimiser,
        config={
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": accumulate,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
        },
    )
    return engine


def gathered(parameter: torch.nn.Parameter) -> Any:
    """A context in which a parameter that ZeRO-3 has scattered is whole."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


MOMENTS = ("exp_avg", "exp_avg_sq")


def read_moments(engine: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Adam's moments of a parameter, whole and on CPU, whatever ZeRO has scattered. Every worker must call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        state = engine.optimizer.state[parameter]
        return {name: state[name].cpu().clone() for name in MOMENTS}
    return {name: safe_get_full_optimizer_state(parameter, name).cpu().clone() for name in MOMENTS}


def write_state(
    engine: Any, parameter: torch.nn.Parameter, value: torch.Tensor, moments: dict[str, torch.Tensor], step: int
) -> None:
    """Puts back a parameter and what `read_moments` read, under any ZeRO stage and number of workers.

    The engine's module must be callable without arguments, as `HarmlessDelta` is.
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if engine.zero_optimization_stage() > 0:  # its moments exist only once it has stepped; this step moves nothing
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine().sum() * 0.0)
            engine.step()
    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)
    if engine.zero_optimization_stage() == 0:
        state = {name: moments[name].to(parameter, copy=True) for name in MOMENTS}  # Adam works in place
        engine.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}
        return
    safe_set_full_fp32_param(parameter, value.to(engine.device))  # ZeRO steps a copy of its own
    for name in MOMENTS:
        safe_set_full_optimizer_state(parameter, moments[name].to(engine.device), name)
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = torch.tensor(float(step))
