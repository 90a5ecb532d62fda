"""Progress: the line that a person sees, and how fast a stage goes.

`Progress` shows stage, counts and time left, on a terminal in one line that is redrawn. The same
goes to its ``watch`` every few seconds: the run's progress.json, which `isic status` reads.

`Meter` counts on each actor for Ray's Prometheus metrics, which Ray exports on every node (``ray
start --metrics-export-port``) with the prefix ``ray_``: isic_pictures_total, isic_tokens_total and
isic_busy_seconds_total by ``do`` (draw, judge), and isic_waiting_shards. The rate of the busy
seconds is the share of time in which an actor's device is at work.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

Record = dict[str, Any]  # a JSON object

WATCH_EVERY_S = 10.0


class Progress:
    """Shows one stage at a time, on stderr unless told otherwise."""

    def __init__(
        self, stream: TextIO | None = None, watch: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._stage, self._total, self._done, self._unit = "", 0, 0, ""
        self._started = time.monotonic()
        self._run_started = time.monotonic()
        self._watch, self._watched = watch, 0.0
        self.figures: Record = {}
        """Throughput of the stage, for those who watch."""

    def start(self, stage: str, total: int = 0, unit: str = "") -> None:
        """Begin a stage of ``total`` units (0: unknown)."""
        self._stage, self._total, self._done, self._unit = stage, total, 0, unit
        self._started, self.figures = time.monotonic(), {}
        self._show()
        self._tell(at_once=True)

    def advance(self, count: int) -> None:
        """Count units that are done."""
        tenth = self._done * 10 // max(1, self._total)
        self._done += count
        if self._live or self._done * 10 // max(1, self._total) > tenth:
            self._show()
        self._tell()

    def finish(self, note: str = "") -> float:
        """End the stage, leave one line behind, and return the stage's seconds."""
        seconds = time.monotonic() - self._started
        count = f"{self._done:,} {self._unit}, " if self._total else ""
        self._write(
            f"{self._stage:<34} {count}{seconds:.0f} s{'  ' + note if note else ''}", end="\n"
        )
        return seconds

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


class Meter:
    """The counters of one actor."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter

        def counter(name: str, text: str) -> Any:
            return Counter(f"isic_{name}_total", description=text, tag_keys=("do",))

        self._pictures = counter("pictures", "pictures drawn, or decoded and judged")
        self._tokens = counter("tokens", "visual tokens of the pictures drawn")
        self._busy = counter("busy_seconds", "seconds of work on shards")
        self._actor = f"{platform.node()}/{os.getpid()}"

    def count(self, do: str, counts: Record, seconds: float) -> Record:
        """Count one shard for Ray, and return what `Throughput` needs to know of it."""
        tags, tokens = {"do": do}, int(counts.get("tokens", 0))
        for counter, value in (
            (self._pictures, counts.get("samples", 0)),
            (self._tokens, tokens),
            (self._busy, seconds),
        ):
            if value > 0:  # a counter refuses zero
                counter.inc(value, tags)
        return {"actor": self._actor, "seconds": round(seconds, 3)}


class Throughput:
    """One stage as the driver sees it.

    Money is counted for actors that were seen at work, idle time included.
    """

    def __init__(self, planned: int, price_per_hour: float) -> None:
        from ray.util.metrics import Gauge

        self._waiting = Gauge(
            "isic_waiting_shards", description="shards of the stage that have not been committed"
        )
        self._planned, self._price = planned, price_per_hour
        self._done, self._pictures, self._tokens, self._busy = 0, 0.0, 0, 0.0
        # By actor: when it began its first shard.
        self._since: dict[str, float] = {}
        self._started = time.monotonic()

    def add(self, counts: Record, pictures: float) -> Record:
        """Count one finished shard of so many pictures, and return all figures."""
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
