"""Step 2 with Ray Train and DeepSpeed: train Δ in the harmless space on rows that Ray Data streams.

The lower half of this file is the one place that knows DeepSpeed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from isic_ray.codebook.finetune import HarmlessDelta, harmful_component, loss
from isic_ray.codebook.targets import Targets
from isic_ray.config.run import FinetuneConfig, RunConfig
from isic_ray.errors import UserError
from isic_ray.execution.training_queue import TrainingGroups, next_job
from isic_ray.models.base import Perceiver, SeesPixels, UnifiedModel
from isic_ray.runs.run import Run

# What a loss compares: pixels or features, and those that are wanted.
View = tuple[Perceiver | None, Targets]

# Trains each job's delta on rows, and returns the tables E″ ``[K,d]``.
Train = Callable[[Sequence["DeltaJob"], np.ndarray], list[torch.Tensor]]

_HARMLESS = 1e-5  # largest component that a trained delta may have in the harmful space


@dataclass(frozen=True)
class DeltaJob:
    """One delta to train."""

    edited: torch.Tensor
    """E′ ``[K,d]``."""
    basis: torch.Tensor | None
    """V ``[d,k]``, the space that the delta keeps out of; None for no such space."""
    trainable: torch.Tensor | None
    """bool ``[K]``, the rows that the delta may move; None for all."""
    loss: str = "pixels"
    """The loss's name, as in ``finetune.loss``."""
    price: torch.Tensor | None = None
    """What moving each row costs ``[K]``; None: 1 each."""

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are set, by field."""
        names = ("edited", "basis", "trainable", "price")
        tensors = {name: getattr(self, name) for name in names}
        return {name: t.contiguous() for name, t in tensors.items() if t is not None}

    def key(self, rows: np.ndarray, finetune: FinetuneConfig) -> str:
        """Name the result: equal inputs give an equal key, so a resumed run finds its delta."""
        settings = (
            finetune.steps,
            finetune.batch_size,
            finetune.learning_rate,
            finetune.regulariser,
            self.loss,
        )
        tensors = sorted(self.to_tensors().items())
        parts = [repr(settings).encode(), rows.tobytes()]
        parts += [name.encode() + tensor.numpy().tobytes() for name, tensor in tensors]
        return hashlib.sha256(b"".join(parts)).hexdigest()


def training_groups(
    config: RunConfig, run: Run, base: torch.Tensor, kept: bool | None = None, count: int = 1
) -> TrainingGroups:
    """Return workers for `train_deltas`; close them when done.

    Targets are rendered under the table ``base`` ``[K,d]``. ``kept`` overrides
    ``execution.keep_workers``; several groups train as many deltas at a time.
    """
    loop_config = {
        "model": config.model,
        "uri": run.store.uri,
        "base": save({"base": base.contiguous()}),
    }
    kept = config.execution.keep_workers if kept is None else kept
    return TrainingGroups(config.finetune, kept, _train, loop_config, count)


def train_deltas(
    groups: TrainingGroups,
    finetune: FinetuneConfig,
    run: Run,
    jobs: Sequence[DeltaJob],
    rows: np.ndarray,
) -> list[torch.Tensor]:
    """Return E″ ``[K,d]`` of each job, trained in turn by one group; finished ones are read back.

    ``rows`` int32 ``[steps*batch,2,N]`` is what is fed, in order: tokens, and the tokens whose base
    pictures they should give.
    """
    import ray
    from ray.data.block import BlockAccessor

    names = [f"deltas/{job.key(rows, finetune)}.safetensors" for job in jobs]
    every = zip(names, jobs, strict=True)
    pending = [(name, job) for name, job in every if not has_blob(run, name)]
    if pending:
        # `ray.data.from_numpy` would start a process to make this block.
        block = BlockAccessor.batch_to_arrow_block({"data": rows})
        deltas = [(name, job.loss, save(job.to_tensors())) for name, job in pending]
        data = ray.data.from_blocks([block])
        groups.run({"deltas": deltas, "finetune": finetune, "rows": data})
    return [load(run.get_blob(name))["table"] for name in names]


def has_blob(run: Run, name: str) -> bool:
    """Say whether a run has the blob FOLDER/FILE."""
    folder, _, file = name.partition("/")
    return not run.pending(folder, [file])


def _train(loop: dict[str, Any]) -> None:
    """Run jobs from the queue; on every Ray Train worker."""
    import ray
    import ray.train

    from isic_ray.models.registry import load_model

    context, device = ray.train.get_context(), ray.train.torch.get_device()
    # Ray gives a worker one thread; while deltas are trained little else of the run works on the
    # machine.
    local = context.get_local_world_size() * loop["groups"]
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    model = load_model(loop["model"])
    renderer = model.renderer().to(device)
    base = load(loop["base"])["base"].to(device)
    run, queue, group = Run.open(loop["uri"]), loop["queue"], loop["group"]
    views: dict[str, View] = {}  # by the loss's name; targets recur in later jobs
    number, first = ray.get(queue.done.remote(group)), context.get_world_rank() == 0
    while (job := next_job(queue, group, number)) is not None:
        failure = ""
        try:
            for name, kind, tensors in job["deltas"]:
                if kind not in views:
                    perceiver = _perceiver(model, kind, device)
                    views[kind] = perceiver, Targets(renderer, base, perceiver)
                delta = load(tensors)
                table = _train_one(
                    job["finetune"],
                    delta,
                    renderer,
                    *views[kind],
                    job["rows"],
                    device,
                    model.normalised,
                )
                if first:
                    run.put_blob(name, save({"table": table}))
        except UserError as error:
            # The same on every worker; the group is still good for other jobs.
            failure = str(error)
        if first:
            ray.get(queue.finish.remote(group, number, failure))
        number += 1
    ray.train.report({})


def _perceiver(model: UnifiedModel, loss: str, device: torch.device) -> Perceiver | None:
    """What the model's judge sees pictures through, on ``device``; None for a loss in pixels."""
    if loss != "pixels" and isinstance(model, SeesPixels):
        return model.perceiver().to(device)
    if loss == "features":
        raise UserError(
            f"the {model.family} family has no vision tower to train through; "
            "set finetune.loss: pixels"
        )
    return None


def _train_one(
    finetune: FinetuneConfig,
    delta: dict[str, torch.Tensor],
    renderer: Any,
    perceiver: Perceiver | None,
    wanted: Targets,
    rows: Any,
    device: torch.device,
    normalised: bool,
) -> torch.Tensor:
    """E″ ``[K,d]`` of one delta, whose tensors are those of `DeltaJob.to_tensors`."""
    import ray.train

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    edited, basis = delta["edited"].to(device), delta.get("basis")
    trainable, price = delta.get("trainable"), delta.get("price")
    module = HarmlessDelta(edited, basis, trainable, normalised, price).to(device)
    optimiser = torch.optim.Adam(module.parameters(), lr=finetune.learning_rate)
    engine = initialise(
        module, optimiser, batch_size=finetune.batch_size // world, zero_stage=finetune.zero_stage
    )
    batches = rows.iter_torch_batches(batch_size=finetune.batch_size, drop_last=True, device=device)
    for step, batch in enumerate(batches):
        for group in engine.optimizer.param_groups:
            group["lr"] = finetune.learning_rate * (1 - step / finetune.steps)
        # Each worker takes its part of every batch, so that the result does not hang on who is
        # faster.
        tokens, targets = batch["data"][rank::world].long().unbind(1)  # [B/W,N] each
        distance = loss(renderer, engine, tokens, wanted(targets), finetune.regulariser, perceiver)
        engine.backward(distance)
        engine.step()
    with gathered(module.delta):
        outside = harmful_component(module.delta, module.basis)
        table = module.table()
    if not (table.isfinite().all() and outside <= _HARMLESS):
        raise UserError(
            f"fine-tuning diverged: the delta reaches {outside:.1e} into the harmful space, and "
            f"the limit is {_HARMLESS}; lower finetune.learning_rate, which is "
            f"{finetune.learning_rate:g}"
        )
    return table.contiguous()


# DeepSpeed


def initialise(
    module: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    *,
    batch_size: int,
    zero_stage: int,
    accumulate: int = 1,
) -> Any:
    """Return a DeepSpeed engine over ``module`` for the current process group.

    ``batch_size`` is pictures per worker and backward pass; ``accumulate`` backward passes make one
    step of the optimiser.
    """
    settings = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed's shared-memory collective compiles for 80-150 s at first use and only speeds up
        # reductions of large CPU tensors, where gloo does for ours.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimiser, config=settings)
    return engine


def gathered(parameter: torch.nn.Parameter) -> Any:
    """A context in which a parameter that ZeRO-3 has scattered is whole."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


MOMENTS = ("exp_avg", "exp_avg_sq")


def read_moments(engine: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Adam's moments of a parameter, whole and on CPU, whatever ZeRO has scattered. Every worker
    must call it.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        state = engine.optimizer.state[parameter]
        return {name: state[name].cpu().clone() for name in MOMENTS}
    return {name: safe_get_full_optimizer_state(parameter, name).cpu().clone() for name in MOMENTS}


def write_state(
    engine: Any,
    parameter: torch.nn.Parameter,
    value: torch.Tensor,
    moments: dict[str, torch.Tensor],
    step: int,
) -> None:
    """Puts back a parameter and what `read_moments` read, under any ZeRO stage and number of
    workers.

    The engine's module must be callable without arguments, as `HarmlessDelta` is.
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if (
        engine.zero_optimization_stage() > 0
    ):  # its moments exist only once it has stepped; this step moves nothing
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine().sum() * 0.0)
            engine.step()
    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)
    if engine.zero_optimization_stage() == 0:
        state = {
            name: moments[name].to(parameter, copy=True) for name in MOMENTS
        }  # Adam works in place
        engine.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}
        return
    safe_set_full_fp32_param(parameter, value.to(engine.device))  # ZeRO steps a copy of its own
    for name in MOMENTS:
        safe_set_full_optimizer_state(parameter, moments[name].to(engine.device), name)
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = torch.tensor(float(step))
