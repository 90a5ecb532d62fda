"""What a person sees while a run works: stage, counts, time left. On a terminal one line that is
redrawn.

The same goes to ``watch`` every few seconds: the run's progress.json, which `isic status` reads
from anywhere.
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

    def __init__(
        self, stream: TextIO | None = None, watch: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
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
        self._write(
            f"{self._stage:<34} {count}{seconds:.0f} s{'  ' + note if note else ''}", end="\n"
        )
        return seconds

    def say(self, text: str) -> None:
        """A line of its own."""
        self._write(text, end="\n")

    def _tell(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._watch is None or not (at_once or now - self._watched >= WATCH_EVERY_S):
            return
        self._watched = now
        driver = {
            "host": platform.node(),
            "pid": os.getpid(),
            "running_s": round(now - self._run_started, 1),
        }
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


Record = dict[str, Any]


class Meter:
    """One actor's counters."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter

        def counter(name: str, text: str) -> Any:
            return Counter(f"isic_{name}_total", description=text, tag_keys=("do",))

        self._pictures = counter("pictures", "pictures drawn, or decoded and judged")
        self._tokens = counter("tokens", "visual tokens of the pictures drawn")
        self._busy = counter("busy_seconds", "seconds of work on shards")
        self._actor = f"{platform.node()}/{os.getpid()}"

    def count(self, do: str, counts: Record, seconds: float) -> Record:
        """Tells Ray, and returns what `Throughput` wants to know of one shard."""
        tags, tokens = {"do": do}, int(counts.get("tokens", 0))
        for counter, value in (
            (self._pictures, counts.get("samples", 0)),
            (self._tokens, tokens),
            (self._busy, seconds),
        ):
            if value > 0:  # a counter refuses nought
                counter.inc(value, tags)
        return {"actor": self._actor, "seconds": round(seconds, 3)}


class Throughput:
    """One stage as the driver sees it. Money is for actors that were seen at work, idle time
    included.
    """

    def __init__(self, planned: int, price_per_hour: float) -> None:
        from ray.util.metrics import Gauge

        self._waiting = Gauge(
            "isic_waiting_shards", description="shards of the stage that have not been committed"
        )
        self._planned, self._price = planned, price_per_hour
        self._done, self._pictures, self._tokens, self._busy = 0, 0.0, 0, 0.0
        self._since: dict[str, float] = {}  # actor → when it began its first shard
        self._started = time.monotonic()

    def add(self, counts: Record, pictures: float) -> Record:
        """Counts one finished shard of so many pictures; returns all figures."""
        now = time.monotonic()
        self._since.setdefault(counts["actor"], max(self._started, now - counts["seconds"]))
        self._done += 1
        self._pictures += pictures
        self._tokens += int(counts.get("tokens", 0))
        self._busy += counts["seconds"]
        self._waiting.set(self._planned - self._done)
        elapsed = max(1e-6, now - min(self._since.values()))
        present = sum(now - since for since in self._since.values())
        return {
            "pictures_per_s": round(self._pictures / elapsed, 3),
            "tokens_per_s": round(self._tokens / elapsed, 1),
            "actors": len(self._since),
            "busy_share": round(min(1.0, self._busy / max(1e-6, present)), 3),
            "waiting": self._planned - self._done,
            "cost": round(self._price * present / 3600, 4),
        }
