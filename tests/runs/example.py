"""What the tests of a run directory store: some rows, and the record of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

from isic_ray.config.run import RunConfig
from isic_ray.runs.run import fingerprint
from isic_ray.runs.schema import Sample, Verdict

SAMPLES = [
    Sample(f"p{n}-0", f"p{n}", "unsafe", "build", 0, 2**40 + n, "m", tuple(range(n, n + 64)))
    for n in range(5)
]
VERDICTS = [
    Verdict("p0-0", "c", "self", ("weapon", "gore"), (0.25, 0.5)),
    Verdict("p1-0", "c", "self", (), (), 31.5),
]


def record_of(config: RunConfig, **more: Any) -> dict[str, Any]:
    plain = dataclasses.asdict(config)
    return {
        "config": plain,
        "fingerprint": fingerprint(config),
        "plan": {"shards": ["0000"]},
        "model_digest": "m",
    } | more
