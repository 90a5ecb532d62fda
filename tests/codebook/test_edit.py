"""Edits of the table: each equation, and `build_edit` on a small world with harm in known rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isic_ray.codebook.edit import (
    build_edit,
    interpolate,
    project,
    project_rows,
    renormalise,
    select_rows,
    transport,
    transport_targets,
)
from isic_ray.codebook.space import random_space
from isic_ray.codebook.usage import Alignment
from isic_ray.config.run import EditConfig
from isic_ray.errors import UserError

torch.set_num_threads(1)
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=20, deadline=None)


def random_table(seed: int, size: int = 20, width: int = 6) -> Tensor:
    return 3 * torch.randn(size, width, generator=torch.Generator().manual_seed(seed))


@quick
@given(seeds, st.integers(1, 5))
def test_projection_is_idempotent_and_leaves_nothing_in_the_harmful_space(
    seed: int, rank: int
) -> None:
    table, basis = random_table(seed), random_space(6, rank, seed)
    once = project(table, basis, 1.0)
    assert float((once @ basis).abs().max()) < 1e-5
    torch.testing.assert_close(project(once, basis, 1.0), once, atol=1e-5, rtol=0)
    half = project(table, basis, 0.5)
    torch.testing.assert_close(half @ basis, 0.5 * (table @ basis), atol=1e-5, rtol=0)
    torch.testing.assert_close(half, (table + once) / 2, atol=1e-5, rtol=0)
    assert torch.equal(project(table, basis, 0.0), table)


def test_a_gate_edits_its_rows_only() -> None:
    table, basis = random_table(0), random_space(6, 2, 0)
    gate = torch.arange(20) % 3 == 0
    edited = project_rows(table, basis, 1.0, gate)
    assert torch.equal(edited[~gate], table[~gate])
    assert torch.equal(edited[gate], project(table, basis, 1.0)[gate])
    soft = project_rows(table, basis, 1.0, 0.25 * gate)
    torch.testing.assert_close(soft, project_rows(table, basis, 0.25, gate))


def test_renormalising_keeps_norms_and_directions_and_spares_vanished_rows() -> None:
    table = torch.tensor([[3.0, 4.0], [5.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    edited = project(table, torch.tensor([[1.0], [0.0]]), 1.0)
    result = renormalise(edited, table)
    # By row: turned, to the norm of its base row; wholly harmful, so back to the base; untouched;
    # zero.
    torch.testing.assert_close(
        result, torch.tensor([[0.0, 5.0], [5.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    )
    assert torch.equal(result[2], table[2])


def test_transport_moves_rows_towards_their_targets() -> None:
    table, target_of = random_table(1), torch.arange(20)
    target_of[3], target_of[4] = 7, 8
    full = transport(table, target_of, 1.0, normalised=False)
    assert torch.equal(full[[3, 4]], table[[7, 8]])
    half = transport(table, target_of, 0.5, normalised=False)
    torch.testing.assert_close(half[3], (table[3] + table[7]) / 2)
    unit = transport(table, target_of, 1.0, normalised=True)
    torch.testing.assert_close(unit.norm(dim=1), table.norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(unit[3], table[7], dim=0), torch.tensor(1.0))
    others = target_of == torch.arange(20)
    for edited in (full, half, unit):
        assert torch.equal(edited[others], table[others])
    assert torch.equal(transport(table, target_of, 0.0, normalised=True), table)


def test_selection_thresholds_are_inclusive_and_the_limit_keeps_the_most_evidence() -> None:
    odds, counts = (
        torch.tensor([1.0, 0.9, 3.0, 2.0, 2.0]),
        torch.tensor([4.0, 99.0, 3.0, 10.0, 10.0]),
    )
    assert select_rows(odds, counts, 1.0, 4.0).tolist() == [True, False, False, True, True]
    assert select_rows(odds, counts, 1.0, 4.0, max_rows=1).tolist() == [
        False,
        False,
        False,
        True,
        False,
    ]
    assert select_rows(odds, counts, 1.0, 4.0, max_rows=9).sum() == 3


def test_targets_are_the_commonest_safe_partners() -> None:
    harmful = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2]])
    safe = torch.tensor([[5, 5, 1, 1, 1, 4, 3, 0]])
    selected = torch.tensor([True, True, True, False, False, False, False])
    table = torch.eye(7)
    table[2] = table[6] + 0.1 * table[5]
    alignment, used = (
        Alignment.empty(7).add(harmful, safe),
        torch.bincount(safe.flatten(), minlength=7),
    )
    targets = transport_targets(alignment, selected, used, table)
    # 0: row 1 is commoner but selected itself; 1: a tie goes to the lower; 2: met only row 0, so
    # the nearest that safe pictures use (row 6 is nearer still, but unused).
    assert targets.tolist() == [5, 3, 5, 3, 4, 5, 6]
    unused = transport_targets(Alignment.empty(7), selected, torch.zeros(7), table)
    assert unused[2] == 6
    assert transport_targets(
        Alignment.empty(7), torch.ones(7).bool(), used, table
    ).tolist() == list(range(7))


def world(seed: int = 0) -> dict[str, Tensor]:
    """Rows 0-3 draw harm where rows 8-11 draw its safe version; the others are scenery.

    Only benign pictures use rows 20-23.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(24, 6, generator=generator)
    table[:4, 0] += 6.0
    harmful = torch.randint(12, 20, (30, 16), generator=generator)
    safe = harmful.clone()
    which = torch.randint(4, (30, 5), generator=generator)
    harmful[:, :5], safe[:, :5] = which, which + 8
    return {
        "base_codebook": table,
        "pairs_harmful": harmful,
        "pairs_safe": safe,
        "benign_tokens": torch.randint(8, 24, (30, 16), generator=generator),
    }


HARM = torch.arange(24) < 4


@pytest.mark.parametrize("normalised", [False, True])
def test_transport_draws_the_safe_picture(normalised: bool) -> None:
    data = world()
    edit = build_edit(**data, config=EditConfig(method="transport"), normalised=normalised)
    assert torch.equal(edit.changed, HARM)
    cosine = torch.cosine_similarity(edit.codebook[:4], data["base_codebook"][8:12])
    torch.testing.assert_close(cosine, torch.ones(4))
    assert torch.equal(edit.codebook[~HARM], data["base_codebook"][~HARM])
    assert edit.basis is not None
    assert edit.basis.shape == (6, 2)
    assert torch.equal(
        edit.codebook, build_edit(**data, config=EditConfig(), normalised=normalised).codebook
    )


@pytest.mark.parametrize("normalised", [False, True])
def test_selective_clears_the_harmful_space_in_harmful_rows_only(normalised: bool) -> None:
    data = world()
    edit = build_edit(**data, config=EditConfig(method="selective"), normalised=normalised)
    assert edit.basis is not None
    assert torch.equal(edit.changed, HARM)
    assert float((edit.codebook[HARM] @ edit.basis).abs().max()) < 1e-5
    if normalised:
        torch.testing.assert_close(edit.codebook.norm(dim=1), data["base_codebook"].norm(dim=1))


@pytest.mark.parametrize("differences", ["token", "pooled"])
def test_paper_finds_the_direction_of_harm_and_random_does_not(differences: str) -> None:
    data, config = world(), EditConfig(method="paper", rank=1, differences=differences)
    paper = build_edit(**data, config=config, normalised=False)
    assert paper.basis is not None
    assert abs(float(paper.basis[0, 0])) > 0.9
    assert paper.changed.all()
    assert float((paper.codebook @ paper.basis).abs().max()) < 1e-5
    control = build_edit(**data, config=replace(config, method="random"), normalised=False, seed=3)
    assert control.basis is not None
    assert control.basis.shape == paper.basis.shape
    assert torch.equal(control.basis, random_space(6, 1, 3))


def test_one_space_per_concept_is_joined() -> None:
    data, config = world(), EditConfig(method="paper", rank=1, merge=False)
    concepts = [("weapon",) if i % 3 else ("weapon", "gore") for i in range(30)]
    joined = build_edit(**data, config=config, normalised=False, concepts_of_pair=concepts)
    assert joined.basis is not None
    assert joined.basis.shape == (6, 2)
    one = build_edit(**data, config=config, normalised=False, concepts_of_pair=[("weapon",)] * 30)
    merged = build_edit(
        **data, config=replace(config, merge=True), normalised=False, concepts_of_pair=concepts
    )
    assert torch.equal(one.codebook, merged.codebook)
    with pytest.raises(ValueError, match="30 pairs"):
        build_edit(**data, config=config, normalised=False, concepts_of_pair=concepts[:4])


def test_none_and_an_empty_selection_change_nothing() -> None:
    data = world()
    for config in (EditConfig(method="none"), EditConfig(min_log_odds=50.0)):
        edit = build_edit(**data, config=config, normalised=True)
        assert torch.equal(edit.codebook, data["base_codebook"])
        assert edit.codebook.data_ptr() != data["base_codebook"].data_ptr()
        assert edit.basis is None
        assert not edit.changed.any()


def test_strength_zero_changes_nothing_and_inputs_stay_untouched() -> None:
    data = world()
    before = {name: value.clone() for name, value in data.items()}
    for method in ("paper", "selective", "transport", "random"):
        assert not build_edit(
            **data, config=EditConfig(method=method, strength=0.0), normalised=True
        ).changed.any()
        build_edit(**data, config=EditConfig(method=method), normalised=True)
    for name, value in data.items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("normalised", [False, True])
def test_half_precision_tables_keep_their_type(normalised: bool) -> None:
    data = world()
    data["base_codebook"] = data["base_codebook"].bfloat16()
    for method in ("paper", "transport"):
        assert (
            build_edit(
                **data, config=EditConfig(method=method), normalised=normalised
            ).codebook.dtype
            == torch.bfloat16
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "magic"}, "magic"),
        ({"strength": -1.0}, "strength"),
        ({"rank": 6}, "rank"),
        ({"differences": "x"}, "'x'"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], says: str) -> None:
    def build() -> None:
        build_edit(**world(), config=replace(EditConfig(), **change), normalised=True)

    with pytest.raises(UserError, match=says):
        build()


def test_no_pairs_are_refused() -> None:
    data = world()
    data["pairs_harmful"], data["pairs_safe"] = data["pairs_harmful"][:0], data["pairs_safe"][:0]
    with pytest.raises(UserError, match="no pairs"):
        build_edit(**data, config=EditConfig(), normalised=True)


@pytest.mark.parametrize("normalised", [False, True])
def test_interpolation_lies_between_and_leaves_equal_rows_alone(normalised: bool) -> None:
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    end = start.clone()
    end[2:] = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    half = interpolate(start, end, 0.5, normalised)
    assert torch.equal(half[:2], start[:2])
    assert torch.equal(interpolate(start, end, 1.0, normalised), end)
    if normalised:
        torch.testing.assert_close(half.norm(dim=1), start.norm(dim=1))
        nearer = torch.cosine_similarity(half, end) > torch.cosine_similarity(start, end)
        assert nearer[2:].all()
    else:
        torch.testing.assert_close(half, (start + end) / 2)
