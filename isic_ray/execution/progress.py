"""What a person sees while a run works: stage, counts, time left. On a terminal one line that is redrawn.

The same goes to ``watch`` every few seconds: the run's progress.json, which `isic status` reads from anywhere.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

WATCH_EVERY_S = 10.0


class Progress:
    """One stage at a time, written to stderr."""

    def __init__(self, stream: TextIO | None = None, watch: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._stage, self._total, self._done, self._unit = "", 0, 0, ""
        self._started = time.monotonic()
        self._run_started = time.monotonic()
        self._watch, self._watched = watch, 0.0
        self.figures: dict[str, Any] = {}  # throughput of the stage, for those who watch

    def start(self, stage: str, total: int = 0, unit: str = "") -> None:
        """Begin a stage of ``total`` units (0: unknown)."""
        self._stage, self._total, self._done, self._unit = stage, total, 0, unit
        self._started, self.figures = time.monotonic(), {}
        self._show()
        self._tell(at_once=True)

    def advance(self, count: int) -> None:
        tenth = self._done * 10 // max(1, self._total)
        self._done += count
        if self._live or self._done * 10 // max(1, self._total) > tenth:
            self._show()
        self._tell()

    def finish(self, note: str = "") -> float:
        """End the stage, leaving one line behind; returns its seconds."""
        seconds = time.monotonic() - self._started
        count = f"{self._done:,} {self._unit}, " if self._total else ""
        self._write(f"{self._stage:<34} {count}{seconds:.0f} s{'  ' + note if note else ''}", end="\n")
        return seconds

    def say(self, text: str) -> None:
        """A line of its own."""
        self._write(text, end="\n")

    def _tell(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._watch is None or not (at_once or now - self._watched >= WATCH_EVERY_S):
            return
        self._watched = now
        driver = {"host": platform.node(), "pid": os.getpid(), "running_s": round(now - self._run_started, 1)}
        counts = {"done": self._done, "total": self._total, "unit": self._unit}
        self._watch(
            {
                "stage": self._stage,
                **counts,
                **self.figures,
                "stage_s": round(now - self._started, 1),
                "driver": driver,
                "at": time.time(),
            }
        )

    def _show(self) -> None:
        text = f"{self._stage:<34}"
        if self._total:
            text += f" {self._done:,} of {self._total:,} {self._unit}"
            elapsed = time.monotonic() - self._started
            if 0 < self._done < self._total:
                text += f", about {elapsed / self._done * (self._total - self._done):.0f} s left"
        self._write(text + " …", end="" if self._live else "\n")

    def _write(self, text: str, end: str) -> None:
        clock = time.monotonic() - self._run_started
        lead = "\r\x1b[K" if self._live else ""
        self._stream.write(f"{lead}[{clock:5.0f} s] {text}{end}")
        self._stream.flush()
