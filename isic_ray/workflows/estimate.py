"""What a run costs at most: pictures, bytes, device hours and money, before anything is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isic_ray.config.run import RunConfig
from isic_ray.runs.schema import HELD_OUT
from isic_ray.runs.shards import Shard

# Measured on stored runs: a Parquet file's frame, and bytes beside the tokens of a sample, of a
# verdict, of a token.
FILE_BYTES, SAMPLE_BYTES, VERDICT_BYTES, TOKEN_BYTES = 3000, 100, 60, 2


@dataclass(frozen=True)
class Cost:
    """Upper bounds; None for what is not known.

    Every unsafe picture is taken as flagged, every round as kept and touching every picture.
    """

    draws: int
    """Pictures sampled."""
    judgements: int
    """Pictures decoded and judged."""
    bytes: int | None
    actor_hours: float | None
    money: float | None


def estimate_cost(
    config: RunConfig, shards: Sequence[Shard], rewrites: int, tokens_each: int | None
) -> Cost:
    """Estimate what the planned ``shards`` and at most ``rewrites`` rewritten prompts cost.

    ``tokens_each`` are tokens per picture; speeds and prices are those that ``config.execution``
    states.
    """
    execution, rounds = config.execution, config.loop.max_rounds
    arms = len([arm for arm in config.loop.arms if arm != "none"])
    held_out = [shard for shard in shards if shard.split == HELD_OUT]
    build = [shard for shard in shards if shard.split != HELD_OUT]
    # Held-out pictures decide a round and an arm; those that build edits are judged again where
    # another round follows.
    decisions = rounds * (2 if config.loop.backoff > 0 else 1) + arms
    sequels = max(0, rounds - 1)
    draws = _samples(shards) + rewrites
    judgements = draws + decisions * _samples(held_out) + sequels * _samples(build)
    hours = money = size = None
    if execution.draws_per_second and execution.judgements_per_second:
        drawing = draws / execution.draws_per_second
        hours = (drawing + judgements / execution.judgements_per_second) / 3600
        money = hours * execution.price_per_hour if execution.price_per_hour else None
    if tokens_each is not None:
        files = len(shards) * 3 + decisions * len(held_out) + sequels * len(build)
        verdicts = judgements * (1 + len(config.judge.auditors))
        # A pair holds both pictures' tokens.
        drawn = (draws + rewrites) * (SAMPLE_BYTES + TOKEN_BYTES * tokens_each)
        size = files * FILE_BYTES + drawn + verdicts * VERDICT_BYTES
    return Cost(draws, judgements, size, hours, money)


def _samples(shards: Sequence[Shard]) -> int:
    return sum(len(shard.cells) for shard in shards)
