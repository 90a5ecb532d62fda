"""The harmful space: what the statistics of pairs keep, and which directions come out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isic_ray.codebook.space import (
    PairStatistics,
    harmful_space,
    join,
    random_space,
    rows,
    spectrum,
)
from isic_ray.errors import UserError

torch.set_num_threads(1)
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=20, deadline=None)


def random_pairs(
    seed: int, pairs: int = 6, tokens: int = 9, size: int = 20, width: int = 5
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(size, width, generator=generator)
    harmful, safe = (
        torch.randint(size, (pairs, tokens), generator=generator, dtype=torch.int32)
        for _ in range(2)
    )
    return table, harmful, safe


def differences(kind: str, table: Tensor, harmful: Tensor, safe: Tensor) -> Tensor:
    """D, written out."""
    deltas = table.double()[harmful.long()] - table.double()[safe.long()]
    return deltas.mean(1) if kind == "pooled" else deltas[harmful != safe]


@quick
@given(seeds, st.sampled_from(["token", "pooled"]), st.booleans())
def test_space_is_the_top_right_singular_vectors(seed: int, kind: str, centre: bool) -> None:
    table, harmful, safe = random_pairs(seed)
    statistics = PairStatistics.empty(5, kind).add(harmful, safe, table)
    d = differences(kind, table, harmful, safe)
    d = d - d.mean(0) if centre else d
    _, sigma, vt = torch.linalg.svd(d, full_matrices=False)
    torch.testing.assert_close(spectrum(statistics, centre), sigma, atol=1e-6, rtol=1e-6)
    basis = harmful_space(statistics, rank=2, centre=centre)
    expected = vt[:2].T @ vt[:2]
    if sigma[1] - sigma[2] > 1e-2 * sigma[0]:  # the space is unique
        torch.testing.assert_close((basis @ basis.T).double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-6, rtol=0)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


@quick
@given(seeds, st.integers(0, 6), st.sampled_from(["token", "pooled"]))
def test_merging_equals_one_pass(seed: int, cut: int, kind: str) -> None:
    table, harmful, safe = random_pairs(seed)
    whole = PairStatistics.empty(5, kind).add(harmful, safe, table)
    left = PairStatistics.empty(5, kind).add(harmful[:cut], safe[:cut], table)
    both = left.merge(PairStatistics.empty(5, kind).add(harmful[cut:], safe[cut:], table))
    assert both.count == whole.count
    torch.testing.assert_close(both.gram, whole.gram, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(both.total, whole.total, atol=1e-10, rtol=1e-12)


def test_large_batches_are_added_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    table, harmful, safe = random_pairs(0)
    whole = PairStatistics.empty(5).add(harmful, safe, table)
    monkeypatch.setattr("isic_ray.codebook.space._CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(PairStatistics.empty(5).add(harmful, safe, table).gram, whole.gram)


@pytest.mark.parametrize("kind", ["token", "pooled"])
def test_only_marked_harmful_tokens_count(kind: str) -> None:
    table, harmful, safe = random_pairs(1)
    only = torch.arange(20) < 8
    masked = torch.where(only[harmful.long()], safe, safe.new_tensor(0))
    harmful_or_same = torch.where(only[harmful.long()], harmful, masked)
    restricted = PairStatistics.empty(5, kind).add(harmful, safe, table, only)
    torch.testing.assert_close(
        restricted.gram, PairStatistics.empty(5, kind).add(harmful_or_same, masked, table).gram
    )


def test_rank_zero_takes_the_smallest_rank_that_holds_the_energy() -> None:
    statistics = PairStatistics(
        torch.diag(torch.tensor([60.0, 30.0, 9.0, 1.0]).double()),
        torch.zeros(4).double(),
        9,
        "token",
    )
    ranks = {
        energy: harmful_space(statistics, rank=0, energy=energy).shape[1]
        for energy in (0.5, 0.6, 0.9, 0.95, 1.0)
    }
    assert ranks == {0.5: 1, 0.6: 1, 0.9: 2, 0.95: 3, 1.0: 3}  # the last is capped at d - 1


def test_space_has_no_arbitrary_directions() -> None:
    """One pair spans one dimension, whatever rank is asked for."""
    statistics = PairStatistics.empty(5, "pooled").add(
        torch.tensor([[0]]), torch.tensor([[1]]), torch.randn(20, 5)
    )
    assert harmful_space(statistics, rank=3).shape == (5, 1)


@pytest.mark.parametrize(("rank", "energy"), [(5, 0.9), (-1, 0.9), (0, 0.0), (0, 1.5)])
def test_bad_settings_are_refused(rank: int, energy: float) -> None:
    table, harmful, safe = random_pairs(0)
    with pytest.raises(UserError, match=r"edit\.(rank|energy)"):
        harmful_space(PairStatistics.empty(5).add(harmful, safe, table), rank, energy)


def test_no_pairs_no_difference_and_no_spread_are_refused() -> None:
    table, harmful, _ = random_pairs(0)
    with pytest.raises(UserError, match="no pairs"):
        harmful_space(PairStatistics.empty(5), rank=1)
    with pytest.raises(UserError, match="no pairs"):
        harmful_space(PairStatistics.empty(5).add(harmful, harmful, table), rank=1)
    same = PairStatistics.empty(5).add(torch.zeros(3, 1), torch.ones(3, 1), table)
    with pytest.raises(UserError, match="same way"):
        harmful_space(same, rank=1, centre=True)


def test_tokens_of_another_model_are_refused() -> None:
    table, harmful, safe = random_pairs(0)
    for bad in (20, -1):
        harmful[0, 0] = bad
        with pytest.raises(UserError, match="another model"):
            PairStatistics.empty(5).add(harmful, safe, table)


@quick
@given(seeds)
def test_join_spans_every_concept_within_the_budget(seed: int) -> None:
    one, two = random_space(6, 2, seed), random_space(6, 1, seed + 1)
    joined = join([one, two, one], max_rank=5)
    assert joined.shape == (6, 3)
    torch.testing.assert_close(joined.T @ joined, torch.eye(3), atol=1e-5, rtol=0)
    for space in (one, two):
        torch.testing.assert_close(joined @ (joined.T @ space), space, atol=1e-4, rtol=0)
    # What two concepts share outranks what one has alone.
    budget = join([one, two, one], max_rank=2)
    assert budget.shape == (6, 2)
    torch.testing.assert_close(
        join([one], max_rank=5) @ join([one], max_rank=5).T, one @ one.T, atol=1e-5, rtol=0
    )


def test_random_space_is_reproducible_and_orthonormal() -> None:
    assert torch.equal(random_space(8, 3, 7), random_space(8, 3, 7))
    assert not torch.equal(random_space(8, 3, 7), random_space(8, 3, 8))
    torch.testing.assert_close(
        random_space(8, 3, 7).T @ random_space(8, 3, 7), torch.eye(3), atol=1e-6, rtol=0
    )
    with pytest.raises(UserError, match=r"edit\.rank"):
        random_space(4, 4, 0)


def test_rows_are_what_the_decoder_sees() -> None:
    table = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert torch.equal(rows(table, normalised=False), table)
    torch.testing.assert_close(rows(table, normalised=True), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
