"""Do the searches find what is there, within their budget, and does negative guidance steer as
its formula says?
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from isic_ray.config.run import ModelConfig
from isic_ray.errors import UserError
from isic_ray.models.base import SamplingSettings
from isic_ray.models.decoding.negative import sample_away, steer
from isic_ray.models.registry import load_model
from isic_ray.workflows.attacks import (
    SEEDS,
    WORDS,
    Budget,
    mutate,
    recover,
    search,
    telling_words,
    vocabulary,
)

SETTINGS = SamplingSettings(guidance=1.5, temperature=0.6)
PROMPTS = [
    "a picture of a red heart",
    "a spoon and a blue cup",
    "an icon of a tree",
    "a yellow star",
]


@cache
def model() -> Any:
    return load_model(ModelConfig())


class Words:
    """A stand-in generator: its tokens spell the prompt's words, its picture is the share of the
    word "blade".
    """

    tokens_per_image = 1

    def __init__(self) -> None:
        self.drawn = 0

    def sample(
        self, prompts: list[str], seeds: list[int], settings: SamplingSettings
    ) -> torch.Tensor:
        self.drawn += len(prompts)
        return torch.tensor(
            [
                [text.split().count("blade") * 100 + seed % 50]
                for text, seed in zip(prompts, seeds, strict=True)
            ]
        )

    def decode(self, tokens: torch.Tensor, table: torch.Tensor) -> np.ndarray:
        return tokens.numpy()


def test_a_search_over_words_finds_the_word_that_matters() -> None:
    stub: Any = Words()
    words = ["blade", "tree", "sky", "cup"]
    found = search(
        stub,
        torch.zeros(1),
        lambda x: x[:, 0] / 400,
        ["a sky", "a cup"],
        [0, 0],
        words,
        SETTINGS,
        WORDS,
        Budget(12, 8),
    )
    assert all(one.score >= 0.5 and one.text.split().count("blade") >= 2 for one in found)
    assert all(one.seed == 0 and 1 < one.queries <= 97 for one in found)
    assert stub.drawn <= 2 + 2 * 96


def test_a_search_over_seeds_changes_seeds_only_and_keeps_its_budget() -> None:
    stub: Any = Words()
    budget = Budget(3, 4)
    found = search(
        stub, torch.zeros(1), lambda x: x[:, 0] / 1000, ["a sky"], [0], [], SETTINGS, SEEDS, budget
    )
    assert found[0].text == "a sky"
    assert found[0].score > 0
    assert stub.drawn == 1 + 3 * 4


def test_a_prompt_that_is_unsafe_at_once_costs_one_picture() -> None:
    stub: Any = Words()
    found = search(
        stub, torch.zeros(1), lambda x: x[:, 0] / 100, ["a blade"], [7], [], SETTINGS, WORDS
    )
    assert (found[0].text, found[0].seed, found[0].queries, stub.drawn) == ("a blade", 7, 1, 1)


def test_mutations_change_one_word() -> None:
    rng = Random(0)
    for _ in range(200):
        text = mutate("a b c", ["x"], rng)
        parts = text.split()
        assert len(parts) in (2, 3, 4)
        assert parts.count("x") <= 1
    assert mutate("a", ["x"], Random(1)).split()


def test_telling_words_are_those_that_rewrites_took_out() -> None:
    unsafe = ["a knife and a cup", "a gun, on a tree", "a knife"]
    safe = ["a spoon and a cup", "a hammer on a tree", "a spoon"]
    assert telling_words(unsafe, safe, 5) == ["knife", "gun"]
    assert vocabulary(unsafe) == ["a", "and", "cup", "gun", "knife", "on", "tree"]


def test_steering_pushes_down_what_the_negative_prompt_favours_and_nothing_else() -> None:
    conditional, unconditional = torch.tensor([[1.0, 2.0, 0.0]]), torch.zeros(1, 3)
    negative = torch.tensor([[-5.0, 1.0, 0.0]])
    assert steer(conditional, unconditional, negative, 1.5, 2.0).tolist() == [[1.5, 0.0, 0.0]]
    assert torch.equal(steer(conditional, unconditional, negative, 1.5, 0.0), 1.5 * conditional)


def test_without_strength_negative_guidance_draws_the_plain_pictures() -> None:
    plain = model().sample(PROMPTS, [1, 2, 3, 4], SETTINGS)
    away = sample_away(model(), PROMPTS, [1, 2, 3, 4], SETTINGS, "a knife", 0.0)
    assert (
        plain != away
    ).float().mean() < 0.05  # other block shapes round otherwise, and a last bit can flip a token
    steered = sample_away(model(), PROMPTS, [1, 2, 3, 4], SETTINGS, PROMPTS[0], 3.0)
    assert (plain[0] != steered[0]).float().mean() > 0.3
    with pytest.raises(UserError, match="not supported for the family other"):
        sample_away(
            type("Other", (), {"family": "other"})(), PROMPTS, [1], SETTINGS, "a knife", 1.0
        )


def test_recovery_turns_the_pictures_back_towards_the_unedited_ones() -> None:
    tokens = model().sample(PROMPTS, [1, 2, 3, 4], SETTINGS)
    base = model().codebook
    edited = base.clone()
    used = torch.unique(tokens)[:20]
    edited[used] = base[used.roll(1)]
    table = recover(model(), edited, tokens, steps=4, batch_size=4)
    wanted = model().decode(tokens).astype(float)
    errors = [np.square(model().decode(tokens, each) - wanted).mean() for each in (edited, table)]
    assert errors[1] < errors[0]
