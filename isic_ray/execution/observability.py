"""How fast a stage goes: from each actor to Ray's Prometheus metrics, and to the driver for `isic status`.

Ray exports the metrics on every node (``ray start --metrics-export-port``), with the prefix ``ray_``:
isic_pictures_total, isic_tokens_total and isic_busy_seconds_total by ``do`` (draw, judge), and isic_waiting_shards.
The rate of the busy seconds is the share of time in which an actor's device is at work.
"""

from __future__ import annotations

import os
import platform
import time
from typing import Any

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
    """One stage as the driver sees it. Money is for actors that were seen at work, idle time included."""

    def __init__(self, planned: int, price_per_hour: float) -> None:
        from ray.util.metrics import Gauge

        self._waiting = Gauge("isic_waiting_shards", description="shards of the stage that have not been committed")
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
