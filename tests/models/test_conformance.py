"""Does Janus keep the contract of the loop, and does the suite notice an adapter that does not?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from isic_ray.models.base import SamplingSettings, UnifiedModel
from isic_ray.models.families.janus import JanusModel
from isic_ray.testing import UnifiedModelConformance
from tests.tiny_checkpoints import tiny_janus


class TestJanus(UnifiedModelConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> UnifiedModel:
        return tiny_janus()


class Careless(JanusModel):
    """Keeps the last edited table, as a real bug would."""

    def decode(self, tokens: Tensor, codebook: Tensor | None = None) -> np.ndarray:
        pictures = super().decode(tokens, codebook)
        if codebook is not None:
            self.codebook = codebook.clone()
        return pictures


def test_the_suite_notices_a_table_that_stays_behind() -> None:
    model = tiny_janus(Careless)
    suite = UnifiedModelConformance()
    with pytest.raises(AssertionError, match="stay behind"):
        suite.test_pictures_are_drawn_under_the_table_that_is_given(model)
    with pytest.raises(AssertionError):
        suite.test_an_edit_does_not_reach_the_judge(model)


def test_the_suite_notices_a_seed_that_is_ignored() -> None:
    class Constant(JanusModel):
        def sample(
            self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
        ) -> Tensor:
            return torch.zeros(len(prompts), self.tokens_per_image, dtype=torch.int32)

    with pytest.raises(AssertionError):
        UnifiedModelConformance().test_a_sample_depends_on_its_own_row_alone(tiny_janus(Constant))
