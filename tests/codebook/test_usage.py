"""How often pictures use each row, and which safe token meets a harmful one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isic_ray.codebook.usage import Alignment, UsageCounts, checked_tokens
from isic_ray.errors import UserError

torch.set_num_threads(1)
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=20, deadline=None)


def random_pairs(
    seed: int, pairs: int = 6, tokens: int = 9, size: int = 20
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (pairs, tokens)
    harmful = torch.randint(size, shape, generator=generator, dtype=torch.int32)
    return harmful, torch.randint(size, shape, generator=generator, dtype=torch.int32)


@quick
@given(seeds, st.integers(0, 6))
def test_merging_equals_one_pass(seed: int, cut: int) -> None:
    harmful, safe = random_pairs(seed)
    whole = Alignment.empty(20).add(harmful, safe)
    left = Alignment.empty(20).add(harmful[:cut], safe[:cut])
    meetings = left.merge(Alignment.empty(20).add(harmful[cut:], safe[cut:]))
    assert torch.equal(meetings.codes, whole.codes)
    assert torch.equal(meetings.counts, whole.counts)

    first = UsageCounts.empty(20).add(harmful[:cut], safe)
    usage = first.merge(UsageCounts.empty(20).add(harmful[cut:]))
    assert torch.equal(
        usage.harmful, torch.bincount(harmful.flatten().long(), minlength=20).double()
    )
    assert torch.equal(usage.safe, first.safe)


def test_alignments_of_two_codebooks_do_not_merge() -> None:
    with pytest.raises(ValueError, match="20 and 21 rows"):
        Alignment.empty(20).merge(Alignment.empty(21))


def test_tokens_of_another_model_are_refused() -> None:
    harmful, safe = random_pairs(0)
    for bad in (20, -1):
        harmful[0, 0] = bad
        with pytest.raises(UserError, match="another model"):
            checked_tokens(harmful, 20)
        with pytest.raises(UserError, match="another model"):
            UsageCounts.empty(20).add(benign=harmful)
        with pytest.raises(UserError, match="another model"):
            Alignment.empty(20).add(harmful, safe)


def test_log_odds_protect_rows_that_safe_or_benign_pictures_use() -> None:
    usage = UsageCounts.empty(4).add(
        harmful=torch.tensor([0] * 10 + [1] * 10 + [2] * 10),
        safe=torch.tensor([1] * 10 + [3] * 20),
        benign=torch.tensor([2] * 10 + [3] * 20),
    )
    odds = usage.log_odds(1.0)
    assert odds[0] > 2
    assert odds[1:].max() < 0.2
    assert usage.log_odds(1.0)[0] == pytest.approx(
        torch.log(torch.tensor((11 / 34) / (1 / 34))).item()
    )
    with pytest.raises(UserError, match="smoothing"):
        usage.log_odds(0.0)


def test_alignment_of_a_large_codebook_stays_sparse() -> None:
    size = 262_144
    meetings = Alignment.empty(size).add(
        torch.tensor([[size - 1, 5, 5]]), torch.tensor([[size - 2, 5, 6]])
    )
    assert meetings.codes.tolist() == [5 * size + 6, (size - 1) * size + size - 2]
    only = torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.tensor([5]), True)
    marked = Alignment.empty(size).add(torch.tensor([[7, 5]]), torch.tensor([[1, 2]]), only)
    assert len(marked.codes) == 1


def test_a_row_is_dear_when_benign_pictures_use_it_and_cheap_when_only_harm_does() -> None:
    usage = UsageCounts.empty(4).add(
        torch.tensor([[0, 0, 0, 1]]), torch.tensor([[1, 2]]), torch.tensor([[1, 1, 3, 3]] * 20)
    )
    price = usage.price()
    assert price.tolist() == [0.25, 20.0, 2.0, 20.0]
