"""Is a rewrite only what changed a prompt?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from isic_ray.judges.rewriting import rewrite_prompts
from isic_ray.models.base import Judge


class Answering(Judge):
    weights_digest = ""

    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        raise AssertionError("it is only asked to rewrite")

    def rewrite(self, prompts: Sequence[str], instruction: str) -> list[str]:
        answers = {"a knife": "a spoon", "a cup": "a cup", "a gun": ""}
        return [answers[instruction.format(prompt=prompt)] for prompt in prompts]


def test_only_a_changed_prompt_is_a_rewrite() -> None:
    prompts = ["a knife", "a cup", "a gun"]
    assert rewrite_prompts(Answering(), prompts, "{prompt}") == ["a spoon", "", ""]
    assert rewrite_prompts(Answering(), [], "{prompt}") == []
