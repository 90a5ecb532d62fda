"""Who runs the units of a run: the interface, and workers in this process.

`isic_ray.execution.pool` has the workers on Ray. Both build their workers from the same class, so
fault tests and benchmarks that stay in one process take the path that a cluster takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from isic_ray.config.run import RunConfig
from isic_ray.execution.progress import Progress

Counts = dict[str, Any]  # what a worker counted while it ran a unit: a JSON object


class Workers(Protocol):
    """Workers of one run."""

    def run(self, units: Sequence[Any], sizes: Sequence[int], progress: Progress) -> list[Counts]:
        """Run the units and return their counts, in the order in which they end.

        ``sizes`` are pictures per unit, for the progress that is shown.
        """
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


class InlineWorkers:
    """One worker in this process, made for each call as actors are for each stage."""

    def __init__(
        self, worker_class: Callable[[RunConfig, str], Any], config: RunConfig, uri: str
    ) -> None:
        self._make = partial(worker_class, config, uri)

    def run(self, units: Sequence[Any], sizes: Sequence[int], progress: Progress) -> list[Counts]:
        """Run the units one after another and return their counts."""
        worker, counts = self._make(), []
        for unit, size in zip(units, sizes, strict=True):
            counts.append(worker.run(unit))
            progress.advance(size)
        return counts

    def close(self) -> None:
        """Do nothing: a worker goes with its call."""
