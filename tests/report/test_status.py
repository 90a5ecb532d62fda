"""What `isic status` tells a person about a run at work."""

from __future__ import annotations

from isic_ray.report.status import describe
from isic_ray.runs.status import RoundStatus, RunStatus

DOING = {
    "stage": "draw",
    "done": 1200,
    "total": 5000,
    "unit": "pictures",
    "driver": {"host": "node-1", "pid": 7},
    "pictures_per_s": 2.5,
    "tokens_per_s": 1440.0,
    "actors": 4,
    "busy_share": 0.925,
    "waiting": 30,
    "cost": 1.5,
}


def test_a_run_at_work_is_described_with_its_throughput() -> None:
    status = RunStatus(
        uri="runs/demo",
        state="running",
        heard_s=5.2,
        doing=DOING,
        outcome=None,
        shards={"tokens": (3, 10)},
        rounds={
            0: RoundStatus(kept=True, unsafe_self=0.75, note=""),
            1: RoundStatus(kept=False, unsafe_self=None, note="too few pairs"),
        },
        quarantined=1,
        tries_over=2,
    )
    assert describe(status).splitlines() == [
        "run         runs/demo",
        "state       running: draw, 1,200 of 5,000 pictures",
        "heard of    5 s ago from node-1, process 7",
        "throughput  2.50 pictures/s, 1,440 tokens/s from 4 actors, busy 92% of the time",
        "queue       30 shards wait",
        "cost        1.50 in this stage so far",
        "tokens      3 of 10 shards committed",
        "round 0     before any edit, unsafe by the model itself 75.0%",
        "round 1     not kept, too few pairs",
        "quarantine  1 rows",
        "done over   2 shards, after deaths of workers",
    ]
