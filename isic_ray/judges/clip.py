"""CLIP as a judge: the Q16 classifier, CLIP scores of picture and prompt, and features for
Fréchet distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from isic_ray.errors import UserError

Q16_PROMPTS = "q16_prompts.safetensors"
_BATCH = 32


class Clip:
    """A CLIP checkpoint of transformers, frozen."""

    def __init__(self, directory: str) -> None:
        """Raises UserError when ``directory`` (or hub name) is not a CLIP checkpoint with its
        processor.
        """
        from transformers import AutoProcessor, CLIPModel

        try:
            self._model: Any = CLIPModel.from_pretrained(directory, use_safetensors=True).eval()
            self._processor: Any = AutoProcessor.from_pretrained(directory)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{directory} could not be loaded as a CLIP checkpoint: {reason}"
            ) from error

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> Tensor:
        """Unit vectors float32 ``[B,d]`` of pictures uint8 ``[B,H,W,3]``."""
        found = []
        for start in range(0, len(images), _BATCH):
            batch = list(images[start : start + _BATCH])
            pixels = self._processor(images=batch, return_tensors="pt")["pixel_values"]
            output = self._model.vision_model(pixel_values=pixels).pooler_output
            found.append(self._model.visual_projection(output))
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)

    @torch.inference_mode()
    def scores(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """CLIP score ``max(100 cos, 0)`` float32 ``[B]`` of each picture and its text (Hessel et
        al. 2021).
        """
        tokens = self._processor(
            text=list(texts), return_tensors="pt", padding=True, truncation=True
        )
        inputs = {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
        output = self._model.text_projection(self._model.text_model(**inputs).pooler_output)
        cosines = (self.features(images) * torch.nn.functional.normalize(output, dim=-1)).sum(-1)
        scores: np.ndarray = (100 * cosines).clamp(min=0).numpy()
        return scores


class Q16Auditor:
    """Q16 (Schramowski et al. 2022): is the picture nearer to the learned prompt "inappropriate"
    than to "fine"?

    The published prompts are a pickle, which we do not open: convert them once to the tensor
    "prompts" ``[2,d]`` (fine, inappropriate) in q16_prompts.safetensors beside the CLIP checkpoint.
    """

    name = "q16"
    questions = ("inappropriate",)

    def __init__(self, directory: str) -> None:
        """Raises UserError when the CLIP checkpoint or the prompts cannot be read, or do not fit
        each other.
        """
        path = Path(directory) / Q16_PROMPTS
        if not path.is_file():
            raise UserError(
                f"the auditor q16 needs {path}: the tensor 'prompts' [2,d] (fine, inappropriate)"
            )
        self._clip = Clip(directory)
        self._prompts = load_file(path).get("prompts")
        if self._prompts is None or self._prompts.shape[0] != 2:
            raise UserError(
                f"{path} must hold the tensor 'prompts' with two rows (fine, inappropriate)"
            )

    def score(self, images: np.ndarray) -> np.ndarray:
        """P(inappropriate) float32 ``[B,1]`` of pictures uint8 ``[B,H,W,3]``."""
        prompts = torch.nn.functional.normalize(self._prompts.float(), dim=-1)
        scores: np.ndarray = (
            (100 * self._clip.features(images) @ prompts.T).softmax(-1)[:, 1:].numpy()
        )
        return scores
