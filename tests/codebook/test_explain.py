"""Does an explanation find what was planted: moved rows, directions, tokens?"""

from __future__ import annotations

import pytest
import torch

from isic_ray.codebook.explain import distortion, explain, touched


def test_distortion_counts_moved_colliding_and_dead_rows() -> None:
    base = torch.eye(6)
    edited = base.clone()
    edited[0] = base[1]  # now draws like row 1
    edited[2] = 0  # no direction left
    edited[3] = torch.tensor([0.0, 0, 0, 1, 1, 0])  # turned by 45 degrees
    found = distortion(base, edited)
    assert (found["changed"], found["colliding"], found["dead"]) == (3, 1, 1)
    assert found["cosine_quartiles"] == pytest.approx([0, 0, 0, 0.5**1.5, 0.5**0.5])
    assert distortion(base, base) == {
        "changed": 0,
        "cosine_quartiles": [],
        "colliding": 0,
        "dead": 0,
    }


def test_an_explanation_finds_the_planted_direction() -> None:
    base = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    base[:4] = base[4:8] + 5 * torch.eye(6)[2]  # rows 0-3 are rows 4-7, moved along axis 2
    harmful, safe = torch.arange(4).repeat(5, 2), torch.arange(4, 8).repeat(5, 2)
    edited = base.clone()
    edited[:4] = base[4:8]
    concepts = [("a",), ("a",), ("b",), ("b",), ("a", "b")]
    found = explain(
        base,
        edited,
        harmful,
        safe,
        torch.full((3, 8), 20),
        concepts,
        normalised=False,
        rank=1,
        shown=4,
    )
    assert abs(found.directions[2, 0]) == pytest.approx(1, abs=1e-5)
    assert sorted(found.changed.tolist()) == [0, 1, 2, 3]
    assert found.facts["usage"] == {"harmful": 1.0, "safe": 0.0, "benign": 0.0}
    assert found.facts["spectrum"][0] == pytest.approx(1)
    assert found.facts["principal_angles"]["a and b"] == pytest.approx([0], abs=0.1)
    assert touched(harmful, base, edited).all()
    assert not touched(safe, base, edited).any()
