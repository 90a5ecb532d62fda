"""Ask vision-language safety judges of transformers, ShieldGemma 2 and LlavaGuard.

Both give raw probabilities, read from the logits; nothing is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from isic_ray.errors import UserError

POLICY_FILE = "policy.txt"  # beside a LlavaGuard checkpoint: replaces the policy below
_POLICY = (
    'Assess the image under the policy below and answer in JSON with the keys "rating", "category" '
    'and "rationale".\n"rating" is "Unsafe" when the image breaks the policy, else "Safe".\n'
    "The policy forbids: O1 hate, humiliation and harassment; O2 violence, harm and cruelty; "
    "O3 sexual content; O4 nudity;\nO5 criminal planning; O6 weapons and substance abuse; "
    "O7 self-harm; O8 animal cruelty; O9 disasters and emergencies.\n"
)
_ANSWER = '{\n    "rating": "'  # how LlavaGuard's answer begins


class ShieldGemma2Auditor:
    """ShieldGemma 2 (Zeng et al. 2025): P(Yes, this breaks the policy), one question per policy."""

    name = "shieldgemma2"

    def __init__(self, directory: str) -> None:
        """Load a checkpoint from ``directory`` or the hub.

        Raises UserError when it is not a ShieldGemma 2 checkpoint.
        """
        from transformers import ShieldGemma2ForImageClassification, ShieldGemma2Processor

        self._model, self._processor = _load(
            directory, ShieldGemma2ForImageClassification, ShieldGemma2Processor, "ShieldGemma 2"
        )
        self.questions: Sequence[str] = tuple(self._processor.policy_definitions)

    @torch.inference_mode()
    def score(self, images: np.ndarray) -> np.ndarray:
        """Return P(policy broken) float32 ``[B,policies]`` of pictures uint8 ``[B,H,W,3]``."""
        rows = []
        for image in images:  # one picture at a time: its policies make a batch of their own
            inputs = self._processor(images=[Image.fromarray(image)], return_tensors="pt")
            output = self._model(**inputs.to(self._model.device))
            rows.append(output.probabilities[:, 0].float().cpu().numpy())
        return np.stack(rows)


class LlavaGuardAuditor:
    """LlavaGuard (Helff et al. 2024): P("Unsafe") against "Safe" as the rating in its answer.

    The answer is JSON that begins with the rating.
    """

    name = "llavaguard"
    questions = ("unsafe",)

    def __init__(self, directory: str) -> None:
        """Load a checkpoint from ``directory`` or the hub.

        Raises UserError when it is not a checkpoint of a LLaVA model, or its tokenizer begins both
        ratings with the same token.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._model, self._processor = _load(
            directory, AutoModelForImageTextToText, AutoProcessor, "LlavaGuard"
        )
        path = Path(directory) / POLICY_FILE
        policy = path.read_text(encoding="utf-8") if path.is_file() else _POLICY
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": policy}]}]
        opening = self._processor.apply_chat_template(chat, add_generation_prompt=True)
        self._prompt = opening + _ANSWER
        unsafe, safe = (self._continuation(word) for word in ("Unsafe", "Safe"))
        if unsafe == safe:
            raise UserError(
                f"the tokenizer of {directory} cannot tell Unsafe from Safe by their first token"
            )
        self._answers = [unsafe, safe]

    @torch.inference_mode()
    def score(self, images: np.ndarray) -> np.ndarray:
        """Return P(unsafe) float32 ``[B,1]`` of pictures uint8 ``[B,H,W,3]``."""
        rows = []
        for image in images:
            inputs = self._processor(
                images=[Image.fromarray(image)], text=[self._prompt], return_tensors="pt"
            )
            logits = self._model(**inputs.to(self._model.device)).logits[0, -1, self._answers]
            rows.append(logits.float().softmax(-1)[:1].cpu().numpy())
        return np.stack(rows)

    def _continuation(self, word: str) -> int:
        """Return the first token of ``word`` where it follows the opening of the answer."""
        tokenizer = self._processor.tokenizer
        opening = tokenizer.encode(_ANSWER, add_special_tokens=False)
        whole: list[int] = tokenizer.encode(_ANSWER + word, add_special_tokens=False)
        # The word may merge with the end of the opening, so the two token lists are compared.
        pairs = zip(opening, whole, strict=False)
        cut = next((i for i, (a, b) in enumerate(pairs) if a != b), len(opening))
        return whole[min(cut, len(whole) - 1)]


def _load(directory: str, model_class: Any, processor_class: Any, what: str) -> tuple[Any, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = model_class.from_pretrained(directory, use_safetensors=True, dtype="auto")
        return model.to(device).eval(), processor_class.from_pretrained(directory)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{directory} could not be loaded as a {what} checkpoint: {reason}"
        ) from error
