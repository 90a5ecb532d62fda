"""Judge pictures by their CLIP features: the Q16 classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from isic_ray.errors import UserError

Q16_PROMPTS = "q16_prompts.safetensors"
_BATCH = 32  # pictures that the model sees together


class Clip:
    """The picture side of a CLIP checkpoint of transformers, frozen."""

    def __init__(self, directory: str) -> None:
        """Load a checkpoint from ``directory`` or the hub.

        Raises UserError when it is not a CLIP checkpoint with its processor.
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
        """Return unit vectors float32 ``[B,d]`` of pictures uint8 ``[B,H,W,3]``."""
        found = []
        for start in range(0, len(images), _BATCH):
            batch = list(images[start : start + _BATCH])
            pixels = self._processor(images=batch, return_tensors="pt")["pixel_values"]
            output = self._model.vision_model(pixel_values=pixels).pooler_output
            found.append(self._model.visual_projection(output))
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)


class Q16Auditor:
    """Q16 (Schramowski et al. 2022): is a picture nearer to the learned prompt "inappropriate"?

    The other learned prompt is "fine". The published prompts are a pickle, which we do not open:
    convert them once to the tensor "prompts" ``[2,d]`` (fine, inappropriate) in
    q16_prompts.safetensors beside the CLIP checkpoint.
    """

    name = "q16"
    questions = ("inappropriate",)

    def __init__(self, directory: str) -> None:
        """Load the CLIP checkpoint and the prompts.

        Raises UserError when either cannot be read, or there are not two prompts.
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
        """Return P(inappropriate) float32 ``[B,1]`` of pictures uint8 ``[B,H,W,3]``."""
        prompts = torch.nn.functional.normalize(self._prompts.float(), dim=-1)
        logits = 100 * self._clip.features(images) @ prompts.T
        scores: np.ndarray = logits.softmax(-1)[:, 1:].numpy()
        return scores
