"""Does `isic plan` foretell pictures, storage, hours and money?"""

from __future__ import annotations

import pytest

from isic_ray.cli import main as cli
from isic_ray.config.run import load_config
from isic_ray.runs.schema import BENIGN, BUILD, HELD_OUT, UNSAFE, Prompt
from isic_ray.runs.shards import plan_shards
from isic_ray.workflows.estimate import estimate_cost

RATES = [
    "execution.draws_per_second=2",
    "execution.judgements_per_second=4",
    "execution.price_per_hour=3",
]


def test_every_kind_of_work_is_counted_once() -> None:
    prompts = [
        Prompt(f"{r}{s}{n}", "text", r, s)
        for r in (UNSAFE, BENIGN)
        for s in (BUILD, HELD_OUT)
        for n in range(90)
    ]
    config = load_config(
        None, [*RATES, "loop.max_rounds=2", "loop.backoff=0", "loop.arms=[random, paper]"]
    )
    found = estimate_cost(config, plan_shards(prompts, 1, 30), rewrites=90, tokens_each=100)
    assert found.draws == 4 * 90 + 90
    # Two rounds and two arms on held-out prompts; the others once more, for the second round.
    assert found.judgements == found.draws + 4 * 180 + 180
    assert found.actor_hours == pytest.approx((found.draws / 2 + found.judgements / 4) / 3600)
    assert found.money == pytest.approx(3 * (found.actor_hours or 0))
    assert found.bytes is not None
    assert found.bytes > found.draws * 200


def test_backing_off_may_double_the_rounds() -> None:
    once, twice = (
        estimate_cost(
            load_config(None, ["loop.max_rounds=3", f"loop.backoff={backoff}", "loop.arms=[]"]),
            plan(),
            0,
            None,
        )
        for backoff in (0, 0.5)
    )
    assert twice.judgements - once.judgements == 3 * 6


def plan() -> list:  # type: ignore[type-arg]
    return plan_shards(
        [Prompt(f"p{n}", "text", UNSAFE, BUILD if n < 4 else HELD_OUT) for n in range(10)], 1, 4
    )


def test_unstated_rates_give_no_money(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--config", "demo", "--set", "prompts.limit=100"]) == 0
    out = capsys.readouterr().out
    assert "state execution.draws_per_second" in out
    assert "money" not in out


def test_the_plan_names_hours_and_money(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--config", "demo", "--set", "prompts.limit=100", *RATES]) == 0
    out = capsys.readouterr().out
    assert "actor-hours" in out
    assert "at 3.00 an actor-hour" in out
    assert "MB" in out
