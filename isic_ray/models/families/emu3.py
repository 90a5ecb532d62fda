"""Emu3 through transformers: one checkpoint draws (Emu3-Gen), another judges and rewrites (-Chat).

Give the first as model.name and the second as judge.model. Each row of a picture's tokens ends with
a separator word, and the prompt names the size. As published, guidance contrasts the prompt with a
list of faults. Pictures are square and have the area ``image_area`` of config.json, or 720 x 720
pixels if it names none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Emu3ForConditionalGeneration, Emu3Processor

from isic_ray.codebook import SafeCodebook
from isic_ray.errors import UserError
from isic_ray.models.checkpoints import digest_files, load_processor, load_stock
from isic_ray.models.decoding.backbone import Backbone
from isic_ray.models.decoding.network import StockNetwork
from isic_ray.models.families.adapter import Painter, export_stock, rows_as_map
from isic_ray.models.families.vocabulary import VocabularyModel
from isic_ray.models.fetching import resolve_checkpoint

# The negative prompt of the published generation procedure (baaivision/Emu3, image_generation.py).
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry."
)
_END_OF_ROW = "<|extra_200|>"


class Emu3Model(VocabularyModel):
    """`UnifiedModel` over a transformers `Emu3ForConditionalGeneration`."""

    family = "emu3"

    def __init__(
        self,
        model: Emu3ForConditionalGeneration,
        processor: Emu3Processor,
        digest: str,
        codebook: Tensor,
    ) -> None:
        """Take ``model`` in its dtype and on its device, and freeze it.

        ``codebook`` ``[K,d]`` is the float32 master table, ``digest`` that of the weight files.
        Raises UserError when the model, its vocabulary and its processor do not belong together.
        """
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.weights_digest, self.codebook = digest, codebook
        self._vq = vq = model.model.vqmodel
        mapping = model.model.vocabulary_mapping
        named, rows = len(mapping.img2bpe), len(codebook)
        if named != rows:
            raise UserError(
                f"the vocabulary names {named} visual tokens, but the codebook has {rows} rows"
            )
        if mapping.eol_token_id is None:
            raise UserError(
                f"the vocabulary lacks {_END_OF_ROW}, which ends every row of a picture"
            )
        self.words = mapping.img2bpe_mapping_tensor.long()
        self._separator: int = mapping.eol_token_id
        self.image_token = processor.image_token
        self.room = model.config.text_config.max_position_embeddings
        sharded = getattr(model, "hf_device_map", None) is not None
        text_model = model.model.text_model
        self.network = StockNetwork(text_model) if sharded else Backbone(text_model)
        self._area: int = getattr(model.config, "image_area", None) or processor.image_area
        rows, columns = processor.calculate_generate_size(
            "1:1", self._area, processor.downsample_ratio
        )
        self.height, self.width = rows * vq.spatial_scale_factor, columns * vq.spatial_scale_factor
        self.painter = Emu3Painter(vq, rows, columns, processor.image_processor)
        self.prepare_sampling(rows, columns, self._separator)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        dtype: str = "float32",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> Emu3Model:
        """Load a checkpoint directory, URI or hub name. Raises UserError unless a sound Emu3."""
        directory = resolve_checkpoint(name)
        codebook = cls.read_codebook(directory)
        processor = load_processor(Emu3Processor, directory, trust_remote_code)
        model = load_stock(
            Emu3ForConditionalGeneration, directory, dtype, device, trust_remote_code, spreads=True
        )
        return cls(model, processor, digest_files(cls.files(directory)), codebook)

    def export(self, artifact: SafeCodebook, directory: Path) -> None:
        """Write a checkpoint for stock transformers, which also reads through the edited table."""
        export_stock(self.model, self.processor, artifact, directory)

    def drawing_ids(self, prompt: str) -> list[int]:
        """Return prompt, size and start of the picture, as the processor writes them."""
        ids: list[int] = self.processor(
            text=[prompt], return_for_image_generation=True, ratio="1:1", image_area=self._area
        )["input_ids"][0]
        return ids

    def free_ids(self) -> list[int]:
        """Return the same with the published list of faults as the prompt."""
        return self.drawing_ids(NEGATIVE_PROMPT)

    def text_ids(self, text: str) -> list[int]:
        """Return one user message, through the checkpoint's chat template where it has one."""
        processor = self.processor
        if template := processor.chat_template or processor.tokenizer.chat_template:
            before, picture, after = text.partition(processor.image_token)
            image = [{"type": "image"}] if picture else []
            content = [*image, {"type": "text", "text": before + after}]
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                add_generation_prompt=True,
            )
        ids: list[int] = processor.tokenizer(processor.bos_token + text)["input_ids"]
        return ids

    def frame(self, height: int, width: int) -> str:
        """Return size, placeholders and the end of the picture."""
        size = self.processor.downsample_ratio
        text: str = self.processor.replace_image_token(
            {"image_sizes": [(height * size, width * size)]}, 0
        )
        return text

    def spread(self, codes: Tensor) -> Tensor:
        """Return words ``[B,h*(w+1)]``: every row of codes and its separator."""
        words = self.words.to(codes.device)[codes]
        return torch.cat([words, torch.full_like(words[:, :, :1], self._separator)], 2).flatten(1)

    def latents(self, images: np.ndarray) -> Tensor:
        """Return ``[B,h,w,d]`` of one block of pictures, resized as the processor does."""
        inputs = self.processor.image_processor(images=list(images), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device, self.dtype)
        frames = pixels[:, None].repeat(1, self._vq.config.temporal_downsample_factor, 1, 1, 1)
        encoded = self._vq.encoder(frames).permute(0, 2, 1, 3, 4)  # [B,c,1,h,w]
        latents: Tensor = self._vq.quant_conv(encoded)[:, :, 0].permute(0, 2, 3, 1)
        return latents


class Emu3Painter(Painter):
    """What `Emu3VQVAE.decode` computes of a picture, with the codebook as an argument.

    The quantised latent enters twice: through ``post_quant_conv``, and as it is, as an input of the
    decoder's norms. The decoder makes four frames of a picture, of which the first counts. The
    others are dropped after the temporal layers, from where on frames are independent: a quarter
    of the cost.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vq: Any, height: int, width: int, image_processor: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vq.post_quant_conv, vq.decoder
        self.grid = height, width
        for name in ("mean", "std"):
            value = torch.tensor(getattr(image_processor, f"image_{name}")).view(3, 1, 1)
            self.register_buffer(name, value.to(vq.device, vq.dtype), persistent=False)
        self.train()

    def forward(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """Return pixels float ``[B,3,H,W]`` of tokens ``[B,N]`` under ``codebook`` ``[K,d]``."""
        quantised = rows_as_map(tokens, codebook, *self.grid)[:, :, None]  # [B,d,1,h,w]
        decoder = self.decoder
        both = torch.cat([self.post_quant_conv(quantised), quantised])
        for layer in decoder.time_res_stack:
            both = layer(both)
        for layer in decoder.time_conv:
            both = layer(both)
            both = both * torch.sigmoid(both)
        hidden, steering = both[:, :, 0].chunk(2)  # the first frame's [B,c,h,w]
        hidden = decoder.middle_block(decoder.conv_in(hidden), steering)
        hidden = decoder.norm_out(decoder.up_block(hidden, steering), steering)
        pixels: Tensor = decoder.conv_out(hidden * torch.sigmoid(hidden))
        return (pixels * self.std + self.mean) * 2 - 1
