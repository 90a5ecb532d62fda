"""A generator and another model that judges and rewrites for it, as one `UnifiedModel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from isic_ray.models.base import Judge, UnifiedModel


class PairedModel:
    """Judging and rewriting go to ``judge``, everything else to ``generator``."""

    def __init__(self, generator: UnifiedModel, judge: Judge) -> None:
        self.generator, self.reader = generator, judge

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["generator"], name)

    @property
    def judge_digest(self) -> str:
        """sha256 hex over the judge's weights."""
        return self.reader.weights_digest

    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        """P(yes) float32 ``[B,Q]`` by the judge."""
        return self.reader.judge(images, questions)

    def rewrite(self, prompts: Sequence[str], instruction: str) -> list[str]:
        """The judge's answers."""
        return self.reader.rewrite(prompts, instruction)
