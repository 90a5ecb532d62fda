"""Chameleon and Anole through transformers, with the picture decoder that it leaves out.

transformers has neither the VQGAN decoder nor picture logits (it masks them). The decoder comes
from ``vqgan.safetensors`` in the checkpoint's directory, which `isic convert` makes of the
published ``tokenizer/vqgan.ckpt``, else from the weights themselves. It is the decoder of
taming-transformers, which transformers has as Janus's. Pictures are drawn as published: only
picture words are allowed, and guidance contrasts the prompt with a bare start of picture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ChameleonForConditionalGeneration, ChameleonProcessor

from isic_ray.codebook import SafeCodebook
from isic_ray.errors import UserError
from isic_ray.models.checkpoints import digest_files, load_processor, load_stock, weight_files
from isic_ray.models.conversion import write_safetensors
from isic_ray.models.decoding.network import StockNetwork
from isic_ray.models.families.adapter import Painter, export_stock, rows_as_map
from isic_ray.models.families.vocabulary import VocabularyModel
from isic_ray.models.families.vqgan import build_decoder
from isic_ray.models.fetching import resolve_checkpoint

VQGAN = "vqgan.safetensors"


class ChameleonModel(VocabularyModel):
    """`UnifiedModel` over a transformers `ChameleonForConditionalGeneration`."""

    family = "chameleon"

    def __init__(
        self,
        model: ChameleonForConditionalGeneration,
        processor: ChameleonProcessor,
        digest: str,
        codebook: Tensor,
        decoder: dict[str, Tensor],
    ) -> None:
        """Take ``model`` in its dtype and on its device, and freeze it.

        ``codebook`` ``[K,d]`` is the float32 master table, ``digest`` that of the weight files;
        ``decoder`` holds the VQGAN's tensors by published name. Raises UserError when the model,
        its vocabulary, its processor and the decoder do not belong together.
        """
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.weights_digest, self.codebook = digest, codebook
        self._vq = model.model.vqmodel
        mapping = model.model.vocabulary_mapping
        named, rows = len(mapping.img2bpe), len(codebook)
        if named != rows:
            raise UserError(
                f"the vocabulary names {named} picture words, but the codebook has {rows} rows"
            )
        self.words = mapping.img2bpe_mapping_tensor.long()
        self._picture_words = torch.tensor(mapping.image_tokens)
        self.image_token = processor.image_token
        self.room = model.config.max_position_embeddings
        self.network = StockNetwork(model.model)
        config = model.config.vq_config
        side = config.resolution // 2 ** (len(config.channel_multiplier) - 1)
        if side**2 != processor.image_seq_length:
            raise UserError(
                f"the model draws {side**2} tokens per picture but the processor has "
                f"{processor.image_seq_length}"
            )
        self.height = self.width = config.resolution
        self._published = {
            name: tensor for name, tensor in decoder.items() if name.startswith("decoder.")
        }
        built = build_decoder(config, self._published)
        self.painter = ChameleonPainter(self._vq.post_quant_conv, built, side)
        self.painter.to(self._vq.device, self._vq.dtype)
        self.prepare_sampling(side, side)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        dtype: str = "float32",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> ChameleonModel:
        """Load a checkpoint directory, URI or hub name.

        Raises UserError when it is not a sound Chameleon, or has no picture decoder.
        """
        directory = resolve_checkpoint(name)
        codebook = cls.read_codebook(directory)
        decoder = read_decoder(directory)
        processor = load_processor(ChameleonProcessor, directory, trust_remote_code)
        model = load_stock(
            ChameleonForConditionalGeneration,
            directory,
            dtype,
            device,
            trust_remote_code,
            spreads=True,
        )
        return cls(model, processor, digest_files(cls.files(directory)), codebook, decoder)

    @classmethod
    def files(cls, directory: Path) -> list[Path]:
        """Return the weight files and, where there is one, the decoder's."""
        beside = directory / VQGAN
        return [*weight_files(directory), *([beside] if beside.is_file() else [])]

    def export(self, artifact: SafeCodebook, directory: Path) -> None:
        """Write a checkpoint for stock transformers, with the decoder's file beside it.

        Both hold the edited table.
        """
        export_stock(self.model, self.processor, artifact, directory)
        parts = {"post_quant_conv": self._vq.post_quant_conv, "quantize": self._vq.quantize}
        rest = {
            f"{part}.{name}": value
            for part, module in parts.items()
            for name, value in module.state_dict().items()
        }
        write_safetensors({**self._published, **rest}, directory / VQGAN)

    def drawing_ids(self, prompt: str) -> list[int]:
        """Return the prompt as a turn of the user, and the start of a picture."""
        return [*self.text_ids(prompt), self.processor.image_start_token_id]

    def free_ids(self) -> list[int]:
        """Return a bare start of picture."""
        return [self.processor.tokenizer.bos_token_id, self.processor.image_start_token_id]

    def text_ids(self, text: str) -> list[int]:
        """Return a turn of the user, which the separator ends."""
        tokenizer = self.processor.tokenizer
        ids: list[int] = tokenizer(text + (tokenizer.sep_token or ""))["input_ids"]
        return ids

    def frame(self, height: int, width: int) -> str:
        """Return start, placeholders and end of the picture."""
        text: str = self.processor.replace_image_token({}, 0)
        return text

    def answer_logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``[R,V]`` of the next word of a text: no picture words, as stock has."""
        logits: Tensor = self.model.lm_head(hidden)
        pictures = self._picture_words.to(logits.device)
        return logits.index_fill(-1, pictures, torch.finfo(logits.dtype).min)

    def latents(self, images: np.ndarray) -> Tensor:
        """Return ``[B,h,w,d]`` of one block of pictures, resized and cropped as stock does."""
        inputs = self.processor.image_processor(images=list(images), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device, self.dtype)
        latents: Tensor = self._vq.quant_conv(self._vq.encoder(pixels))
        return latents.permute(0, 2, 3, 1)


class ChameleonPainter(Painter):
    """The VQGAN's decoder, with the codebook as an argument."""

    def __init__(self, post_quant_conv: nn.Module, decoder: nn.Module, side: int) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder, self.side = post_quant_conv, decoder, side
        self.requires_grad_(False).train()

    def forward(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """Return pixels float ``[B,3,H,W]`` of tokens ``[B,N]`` under ``codebook`` ``[K,d]``."""
        latents = rows_as_map(tokens, codebook, self.side, self.side)
        pixels: Tensor = self.decoder(self.post_quant_conv(latents))
        return pixels


def read_decoder(directory: Path) -> dict[str, Tensor]:
    """Return the VQGAN's tensors by published name, from their own file or from the weights.

    Raises UserError, which says how to get them, when there are none.
    """
    beside = directory / VQGAN
    if beside.is_file():
        found: dict[str, Tensor] = load_file(beside)
        return found
    inside: dict[str, Tensor] = {}
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                if "vqmodel.decoder." in name:
                    inside[name.partition("vqmodel.")[2]] = weights.get_tensor(name)
    if not inside:
        raise UserError(
            f"{directory} has no picture decoder (transformers leaves it out): "
            "get tokenizer/vqgan.ckpt of the published Chameleon or Anole, "
            f"and run `isic convert vqgan.ckpt --to {beside}`"
        )
    return inside
