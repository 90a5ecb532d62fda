"""Write a small LlamaGen: the published pickles, and the directory that `isic convert` makes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import processors
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from isic_ray.models.conversion import convert_llamagen
from tests.tiny_checkpoints.common import WORDS, livelier, tokenizer

LLAMAGEN_CODES, LLAMAGEN_SIDE, LLAMAGEN_HEADS, LLAMAGEN_PREFIX = 64, 4, 4, 12


def llamagen_published(directory: Path, seed: int = 0) -> Path:
    """Write ``t2i.pt`` and ``vq.pt`` as published (pickles), and a T5 directory ``t5``.

    Pictures have 32 x 32 pixels.
    """
    directory.mkdir(parents=True, exist_ok=True)
    torch.save({"model": _transformer(seed)}, directory / "t2i.pt")
    torch.save({"model": _Tokenizer(seed).tensors, "steps": 3}, directory / "vq.pt")
    named = {"pad_token": "<pad>", "eos_token": "</s>"}
    words = tokenizer(["<pad>", "</s>", "<unk>"], WORDS, **named)
    words.padding_side = "right"
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words.eos_token_id)]
    )
    words.save_pretrained(directory / "t5")
    config = T5Config(
        vocab_size=len(words),
        d_model=48,
        d_kv=12,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    livelier(T5EncoderModel(config), seed).save_pretrained(directory / "t5")
    return directory


def llamagen(directory: Path, seed: int = 0) -> Path:
    """Write the same and convert it; returns the converted directory."""
    published = llamagen_published(directory / "published", seed)
    to = directory / "converted"
    convert_llamagen(
        published / "t2i.pt", published / "vq.pt", published / "t5", to, 32, LLAMAGEN_HEADS
    )
    return to


def _transformer(
    seed: int, width: int = 64, layers: int = 2, hidden: int = 96
) -> dict[str, Tensor]:
    """Return random tensors by LlamaGen's published names and shapes."""
    generator = torch.Generator().manual_seed(seed)

    def linear(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * 1.4 / columns**0.5

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(width, generator=generator)

    tensors = {
        "tok_embeddings.weight": torch.randn(LLAMAGEN_CODES, width, generator=generator),
        "norm.weight": torch.ones(width),
        "output.weight": linear(LLAMAGEN_CODES, width),
        "cls_embedding.uncond_embedding": torch.randn(LLAMAGEN_PREFIX, 48, generator=generator),
        "cls_embedding.cap_proj.fc1.weight": linear(width, 48),
        "cls_embedding.cap_proj.fc2.weight": linear(width, width),
    }
    for layer in range(layers):
        tensors |= {
            f"layers.{layer}.attention.wqkv.weight": linear(3 * width, width),
            f"layers.{layer}.attention.wo.weight": linear(width, width),
            f"layers.{layer}.feed_forward.w1.weight": linear(hidden, width),
            f"layers.{layer}.feed_forward.w3.weight": linear(hidden, width),
            f"layers.{layer}.feed_forward.w2.weight": linear(width, hidden),
            f"layers.{layer}.attention_norm.weight": norm(),
            f"layers.{layer}.ffn_norm.weight": norm(),
        }
    return tensors


class _Tokenizer:
    """Random tensors by the published tokenizer's names and shapes.

    Multipliers are 1, 1, 1, 2, with one block per level.
    """

    def __init__(self, seed: int, base: int = 32, latent: int = 32, code: int = 8) -> None:
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.tensors: dict[str, Tensor] = {}
        widths = [base, base, base, 2 * base]
        self.encoder(widths, latent)
        self.conv("quant_conv", latent, code, 1)
        self.conv("post_quant_conv", code, latent, 1)
        self.decoder(widths, latent)
        self.tensors["quantize.embedding.weight"] = self.random(LLAMAGEN_CODES, code)
        self.tensors["quantize.codebook_used"] = torch.zeros(16)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def conv(self, name: str, before: int, after: int, size: int = 3) -> None:
        kernels = self.random(after, before, size, size)
        self.tensors[f"{name}.weight"] = kernels * 1.4 / before**0.5 / size
        self.tensors[f"{name}.bias"] = 0.1 * self.random(after)

    def norm(self, name: str, width: int) -> None:
        self.tensors[f"{name}.weight"] = 1 + 0.1 * self.random(width)
        self.tensors[f"{name}.bias"] = 0.1 * self.random(width)

    def residual(self, name: str, before: int, after: int) -> None:
        self.norm(f"{name}.norm1", before)
        self.conv(f"{name}.conv1", before, after)
        self.norm(f"{name}.norm2", after)
        self.conv(f"{name}.conv2", after, after)
        if before != after:
            self.conv(f"{name}.nin_shortcut", before, after, 1)

    def attention(self, name: str, width: int) -> None:
        self.norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", width, width, 1)

    def middle(self, name: str, width: int) -> None:
        self.residual(f"{name}.0", width, width)
        self.attention(f"{name}.1", width)
        self.residual(f"{name}.2", width, width)

    def encoder(self, widths: list[int], latent: int) -> None:
        self.conv("encoder.conv_in", 3, widths[0])
        for level, width in enumerate(widths):
            name = f"encoder.conv_blocks.{level}"
            self.residual(f"{name}.res.0", widths[max(level - 1, 0)], width)
            if level == len(widths) - 1:
                self.attention(f"{name}.attn.0", width)
            else:
                self.conv(f"{name}.downsample.conv", width, width)
        self.middle("encoder.mid", widths[-1])
        self.norm("encoder.norm_out", widths[-1])
        self.conv("encoder.conv_out", widths[-1], latent)

    def decoder(self, widths: list[int], latent: int) -> None:
        before = widths[-1]
        self.conv("decoder.conv_in", latent, before)
        self.middle("decoder.mid", before)
        for step, width in enumerate(reversed(widths)):
            name = f"decoder.conv_blocks.{step}"
            for block in range(2):
                self.residual(f"{name}.res.{block}", before, width)
                if step == 0:
                    self.attention(f"{name}.attn.{block}", width)
                before = width
            if step < len(widths) - 1:
                self.conv(f"{name}.upsample.conv", width, width)
        self.norm("decoder.norm_out", widths[0])
        self.conv("decoder.conv_out", widths[0], 3)
