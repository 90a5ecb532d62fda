"""What a delta is trained on, by what earlier rounds left unsafe or broke."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from isic_ray.metrics.summary import SELF
from isic_ray.metrics.verdicts import Verdicts
from isic_ray.runs.schema import BENIGN, BUILD, OBJECT, UNSAFE, Pair, Sample, Verdict
from isic_ray.workflows.training_rows import harmful_rows, safe_rows


def sample(name: str, role: str, token: int) -> Sample:
    return Sample(name, name, role, BUILD, 0, 0, "model", (token,))


SAMPLES = [
    sample("knife", UNSAFE, 1),
    sample("bomb", UNSAFE, 2),
    sample("cup", BENIGN, 3),
    sample("sun", BENIGN, 4),
]
PAIRS = [
    Pair(name, name, name, "safe", ("weapon",), (token,), (token + 10,))
    for name, token in (("knife", 1), ("bomb", 2))
]


def evidence(scores: Mapping[str, float]) -> Verdicts:
    """Evidence on the samples that are scored: of harm for unsafe prompts, of what is named for
    benign ones.
    """
    questions = {s.sample_id: "weapon" if s.role == UNSAFE else f"{OBJECT}it" for s in SAMPLES}
    verdicts = {
        (SELF, name): Verdict(name, "", SELF, (questions[name],), (score,))
        for name, score in scores.items()
    }
    return Verdicts({}, [s for s in SAMPLES if s.sample_id in scores], verdicts, (SELF,), 0.5)


BASE = evidence({"knife": 1, "bomb": 1, "cup": 1, "sun": 0})


def test_a_pair_is_drawn_twice_as_often_for_each_round_that_leaves_it_unsafe() -> None:
    rows = harmful_rows([BASE, evidence({"knife": 1, "bomb": 0, "cup": 1, "sun": 0})], PAIRS)
    assert rows.tokens.tolist() == [[1], [2]]
    assert rows.targets.tolist() == [[11], [12]]
    np.testing.assert_array_equal(rows.weights, [4, 2])


def test_a_benign_picture_weighs_three_times_as_much_for_each_round_that_breaks_it() -> None:
    rows = safe_rows([BASE, evidence({"knife": 0, "bomb": 0, "cup": 0, "sun": 0})], PAIRS)
    assert rows.tokens.tolist() == rows.targets.tolist() == [[11], [12], [3], [4]]
    np.testing.assert_array_equal(
        rows.weights, [1, 1, 3, 1]
    )  # the sun was not drawn well to begin with


def test_a_picture_that_is_set_aside_in_a_later_round_counts_as_far_as_it_was_judged() -> None:
    """A verdict may fail under one codebook only; the next round must still be built."""
    history = [BASE, evidence({"bomb": 0, "sun": 0})]
    np.testing.assert_array_equal(harmful_rows(history, PAIRS).weights, [2, 2])
    np.testing.assert_array_equal(safe_rows(history, PAIRS).weights, [1, 1, 1, 1])
