"""Use any vision-language model of transformers as a judge and rewriter; it draws nothing.

Pictures are read in blocks of one size and prompts one at a time, so that results do not depend on
the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from isic_ray.errors import UserError
from isic_ray.models.base import Judge
from isic_ray.models.checkpoints import (
    digest_files,
    first_line,
    load_processor,
    load_stock,
    weight_files,
)
from isic_ray.models.decoding.asking import answer_ids, yes_share
from isic_ray.models.decoding.text import ANSWER_LIMIT
from isic_ray.models.families.adapter import picture_blocks
from isic_ray.models.fetching import resolve_checkpoint


class VisionLanguageJudge(Judge):
    """`Judge` over an image-text-to-text model with a chat template."""

    def __init__(self, model: Any, processor: Any, digest: str) -> None:
        """Take ``model``, whose weight files have ``digest``, and freeze it.

        Raises UserError when the processor has no chat template.
        """
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.weights_digest = digest
        if not (getattr(processor, "chat_template", None) or processor.tokenizer.chat_template):
            raise UserError(
                f"judge.model: {type(processor).__name__} has no chat template "
                "to ask questions through"
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        dtype: str = "float32",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> VisionLanguageJudge:
        """Load a checkpoint directory, URI or hub name.

        Raises UserError when it is no vision-language model.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        directory = resolve_checkpoint(name)
        try:
            processor = load_processor(AutoProcessor, directory, trust_remote_code)
            model = load_stock(
                AutoModelForImageTextToText, directory, dtype, device, trust_remote_code
            )
        except UserError as error:
            raise UserError(f"judge.model {name!r}: {first_line(error)}") from error
        return cls(model, processor, digest_files(weight_files(directory)))

    @torch.inference_mode()
    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        """Return P(yes) float32 ``[B,Q]``, over all one-token spellings of yes and no.

        Raises UserError when the tokenizer has no one-token yes or no.
        """
        answers = [answer_ids(self.processor.tokenizer, word) for word in ("yes", "no")]
        result = torch.empty(len(images), len(questions))
        for rows in picture_blocks(len(images)):
            pictures = [Image.fromarray(images[row]) for row in rows]
            for index, question in enumerate(questions):
                asked = [[{"type": "image", "image": p}, _text(question)] for p in pictures]
                inputs = self._inputs(asked)
                logits = self.model(**inputs, logits_to_keep=1).logits[:, -1]
                result[torch.from_numpy(rows), index] = yes_share(logits, *answers).cpu()
        return result

    @torch.inference_mode()
    def rewrite(self, prompts: Sequence[str], instruction: str) -> list[str]:
        """Return the greedy answer to each ``instruction.format(prompt=...)``, stripped."""
        answers = []
        for prompt in prompts:
            inputs = self._inputs([[_text(instruction.format(prompt=prompt))]])
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_LIMIT)
            new = ids[0, inputs["input_ids"].shape[1] :]
            answers.append(self.processor.tokenizer.decode(new, skip_special_tokens=True).strip())
        return answers

    def _inputs(self, contents: list[list[dict[str, Any]]]) -> Any:
        """Return the model's inputs for one user message per row; all are equally long."""
        inputs = self.processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in contents],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return inputs.to(self.model.device, self.model.dtype)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
