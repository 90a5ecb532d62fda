"""The one place that imports DeepSpeed."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch


def initialise(module: torch.nn.Module, optimiser: torch.optim.Optimizer, *, batch_size: int, zero_stage: int) -> Any:
    """A DeepSpeed engine over ``module`` for the current process group; ``batch_size`` is per worker.

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
