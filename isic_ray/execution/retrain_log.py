"""Metrics of a training in its store: `metrics.jsonl`, and the same for TensorBoard."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from isic_ray.runs.store import Store

Record = dict[str, Any]
METRICS = "metrics.jsonl"


class RetrainLog:
    """Rows with a ``step``.

    `flush` keeps them; a checkpoint calls it, so that log and checkpoint go together.
    """

    def __init__(self, store: Store, step: int) -> None:
        """Go on behind ``step``.

        Later rows, of a worker that was lost before it saved, are dropped.
        """
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

        self.store, self._rows = store, [row for row in self.read(store) if row["step"] <= step]
        self._folder = Path(tempfile.mkdtemp(prefix="isic-tensorboard-"))
        self._board = SummaryWriter(str(self._folder))

    def add(self, row: Record) -> None:
        """Note a row."""
        self._rows.append(row)
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Store all rows, and TensorBoard's files."""
        lines = (json.dumps(row, allow_nan=False) + "\n" for row in self._rows)
        self.store.put(METRICS, "".join(lines).encode())
        self._board.flush()
        for path in self._folder.iterdir():
            self.store.put(f"tensorboard/{path.name}", path.read_bytes())

    @staticmethod
    def read(store: Store) -> list[Record]:
        """Return all rows that were stored."""
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line) for line in store.get(METRICS).decode().splitlines()]
        return []
