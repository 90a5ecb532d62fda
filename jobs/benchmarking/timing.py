"""Timing for `jobs/benchmark.py`: what is measured by turns, and what the machine can do."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isic_ray.models.decoding.backbone import fuse

Figures = dict[str, Any]


def by_turns(doings: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Return the median seconds of each, run one after another in every repeat.

    So a slow minute slows all of them alike.
    """
    times: list[list[float]] = [[] for _ in doings]
    for turn in range(repeats + 1):
        for doing, own in zip(doings, times, strict=True):
            synchronise()
            began = time.perf_counter()
            doing()
            synchronise()
            if turn:  # the first one warms up
                own.append(time.perf_counter() - began)
    return [statistics.median(own) for own in times]


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations per second of the best matrix product, by the kernel that the loop uses."""
    side = 1024 if device.type == "cpu" else 8192
    linear = nn.Linear(side, side, bias=False, device=device, dtype=dtype).requires_grad_(False)
    product, x = fuse(linear), torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(best_of(lambda: product(x)))


def peak_bandwidth(count: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return bytes per second read from a buffer as large as ``count`` weights.

    They come from a cache where they fit into one.
    """
    buffer = torch.ones(count, device=device, dtype=dtype)
    return buffer.numel() * buffer.element_size() / min(best_of(buffer.sum))


def best_of(doing: Callable[[], Any]) -> list[float]:
    """Return the seconds of ten runs."""
    return [by_turns([doing], 1)[0] for _ in range(10)]


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> float:
    """Return the most memory so far in MiB: the GPU's, or this process's."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def hardware() -> Figures:
    """Describe the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    known = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    flags = known.get("flags", "").split()
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16") if flag in flags]
    processor = known.get("model name", "unknown")
    return {
        "machine": f"{os.cpu_count()}-core {platform.machine()} ({processor})",
        "gpu": gpu or "none",
        "instructions": wide,
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }
