"""LlamaGen (text to image), from its published weights; it is not in transformers.

Its transformer is a LLaMA with rotary positions over the picture's grid, and its tokenizer is the
one that Janus uses too, so both run on transformers' modules, with the published tensors under
other names. `isic convert` makes the directory that this adapter loads: ``config.json``,
``model.safetensors`` and ``vq.safetensors`` (the published tensors by their published names), and
``text_encoder/`` (FLAN-T5 with its tokenizer). It draws only: give judge.model.

Prompts are put in lower case, as in the published option without caption cleaning.

Shapes: B pictures, P positions before the picture, N tokens per picture, L words of a prompt, R
rows in flight, T cache slots, D head size, h hidden size.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    JanusVQVAE,
    JanusVQVAEConfig,
    LlamaConfig,
    LlamaModel,
    T5EncoderModel,
)

from isic_ray.codebook import SafeCodebook
from isic_ray.errors import UserError
from isic_ray.models.base import SamplingSettings
from isic_ray.models.checkpoints import (
    digest_files,
    load_processor,
    load_stock,
    read_config,
    read_headers,
    resolve_device,
    resolve_dtype,
    weight_files,
)
from isic_ray.models.conversion import write_safetensors
from isic_ray.models.decoding.backbone import Backbone
from isic_ray.models.decoding.picture_sampler import PictureSampler, one_token
from isic_ray.models.families.adapter import (
    Painter,
    VisualAdapter,
    picture_blocks,
    pixels_of,
    rows_as_map,
)
from isic_ray.models.families.published import fill, tensor_named
from isic_ray.models.fetching import resolve_checkpoint

GPT, VQ, TEXT_ENCODER = "model.safetensors", "vq.safetensors", "text_encoder"
_NORM_EPS = 1e-5
_ROPE_BASE = 10000.0
_LAYER_NAMES = {  # transformers' names and the published ones, beside queries, keys and values
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


class LlamaGenModel(VisualAdapter):
    """The drawing half of a `UnifiedModel`; ``.model`` is the tokenizer, which holds the table."""

    family = "llamagen"
    normalised = True
    codebook_key = "quantize.embedding.weight"

    def __init__(
        self, directory: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
    ) -> None:
        """Load and freeze everything.

        Raises UserError for tensors that are missing or do not fit together.
        """
        self._directory = directory
        self.codebook = self.read_codebook(directory)
        config = read_config(directory)
        gpt, vq = load_file(directory / GPT), load_file(directory / VQ)
        self.height = self.width = config["image_size"]
        side = int(config["image_size"]) // 2 ** (_levels(vq) - 1)
        self.tokens_per_image = side**2
        self.model = build_tokenizer(vq, side).to(device)
        self.painter = LlamaGenPainter(self.model, side)
        self._encoder = load_stock(
            T5EncoderModel,
            directory / TEXT_ENCODER,
            str(dtype).removeprefix("torch."),
            str(device),
            trust_remote_code,
        ).requires_grad_(False)
        self._words = load_processor(AutoTokenizer, directory / TEXT_ENCODER, trust_remote_code)
        free = tensor_named(gpt, "cls_embedding.uncond_embedding")
        prefix = len(free)
        llama = build_transformer(gpt, int(config["heads"]), prefix, side).to(device, dtype)
        self._caption = [
            tensor_named(gpt, f"cls_embedding.cap_proj.{name}.weight").to(device, dtype)
            for name in ("fc1", "fc2")
        ]
        self._free = self._project(free.to(device, dtype))  # [P,h]
        head = tensor_named(gpt, "output.weight").to(device, dtype)
        if head.shape[0] != len(self.codebook):
            raise UserError(
                f"{directory}: the model draws {head.shape[0]} tokens, "
                f"the table has {len(self.codebook)} rows"
            )
        network = Backbone(llama)
        self._sampler = PictureSampler(
            network,
            one_token(network.embedding, lambda hidden: F.linear(hidden, head)),
            positions=side**2,
            width=prefix,
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        dtype: str = "float32",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> LlamaGenModel:
        """Load a directory that `isic convert` made. Raises UserError when it is not whole."""
        directory = resolve_checkpoint(name)
        model = cls(directory, resolve_dtype(dtype), resolve_device(device), trust_remote_code)
        model.weights_digest = digest_files(cls.files(directory))
        return model

    @classmethod
    def files(cls, directory: Path) -> list[Path]:
        """Return the files of transformer, tokenizer and text encoder."""
        for name in (GPT, VQ):
            if not (directory / name).is_file():
                raise UserError(
                    f"{directory} has no {name}; "
                    "make it with `isic convert` from the published files"
                )
        files = [directory / GPT, directory / VQ, *weight_files(directory / TEXT_ENCODER)]
        read_headers(files)
        return files

    def export(self, artifact: SafeCodebook, directory: Path) -> None:
        """Write a directory that this adapter loads, with the edit in its table.

        Its ``vq.pt`` is for the original code.
        """
        shutil.copytree(self._directory, directory, dirs_exist_ok=True)
        tensors = load_file(self._directory / VQ)
        tensors[self.codebook_key] = artifact.apply_to(tensors[self.codebook_key])
        write_safetensors(tensors, directory / VQ)
        torch.save({"model": tensors}, directory / "vq.pt")

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
    ) -> Tensor:
        """Return visual tokens int32 ``[B,N]`` on CPU; see `UnifiedModel.sample`.

        Prompts too long are cut, as published.
        """
        conditions = self._conditions([prompt.lower().strip() for prompt in prompts])
        free = [self._free[len(self._free) - len(condition) :] for condition in conditions]
        return self._sampler.draw(conditions, free, list(seeds), settings)

    def latents(self, images: np.ndarray) -> Tensor:
        """Return ``[B,h,w,d]`` of one block of pictures."""
        pixels = pixels_of(images).to(self.device)
        latents: Tensor = self.model.quant_conv(self.model.encoder(pixels))
        return latents.permute(0, 2, 3, 1)

    @torch.inference_mode()
    def _conditions(self, texts: list[str]) -> list[Tensor]:
        """Return embeddings ``[L,h]`` of each prompt: its words by the text encoder, projected."""
        found: dict[int, Tensor] = {}
        # blocks of one size, so that results do not depend on the batch
        for rows in picture_blocks(len(texts)):
            words = self._words(
                [texts[i] for i in rows],
                max_length=len(self._free),
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).to(self._encoder.device)
            masks = words["attention_mask"]
            states = self._encoder(input_ids=words["input_ids"], attention_mask=masks)[0]
            for row, state, mask in zip(rows.tolist(), states, masks.bool(), strict=True):
                found[row] = self._project(state[mask])
        return [found[row] for row in range(len(texts))]

    def _project(self, states: Tensor) -> Tensor:
        first, second = self._caption
        return F.linear(F.gelu(F.linear(states, first), approximate="tanh"), second)


class LlamaGenPainter(Painter):
    """The tokenizer's decoder, with the codebook as an argument; rows are normalised."""

    def __init__(self, tokenizer: Any, side: int) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = tokenizer.post_quant_conv, tokenizer.decoder
        self.side = side
        self.train()

    def forward(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """Return pixels float ``[B,3,H,W]`` of tokens ``[B,N]`` under ``codebook`` ``[K,d]``."""
        latents = F.normalize(rows_as_map(tokens, codebook, self.side, self.side), dim=1)
        pixels: Tensor = self.decoder(self.post_quant_conv(latents))
        return pixels


class GridRotary(nn.Module):
    """Rotary angles by the row and column of a picture token; the prompt's slots come first.

    Those have cosine and sine zero, as in the published model: the keys and queries of a prompt
    vanish, so all of it gets the same attention.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, prefix: int, side: int, head_dim: int) -> None:
        super().__init__()
        half = head_dim // 2
        speeds = _ROPE_BASE ** -(torch.arange(0, half, 2).float() / half)
        along = torch.outer(torch.arange(side), speeds)  # [side, half/2]
        rows = along[:, None].expand(-1, side, -1)
        columns = along[None].expand(side, -1, -1)
        angles = torch.cat([rows, columns], -1).flatten(0, 1).repeat(1, 2)  # [N,D], halves alike
        for name, values in (("cos", angles.cos()), ("sin", angles.sin())):
            padded = F.pad(values, (0, 0, prefix, 0))  # [P+N,D]
            self.register_buffer(name, padded, persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``[R,T,D]`` of slots 0 to T - 1.

        ``positions`` ``[R,T]`` gives the shape only, ``x`` dtype and device.
        """
        rows, slots = positions.shape
        cos, sin = (
            table[:slots].to(x.device, x.dtype).repeat(rows, 1, 1) for table in (self.cos, self.sin)
        )
        return cos, sin


def build_transformer(gpt: dict[str, Tensor], heads: int, prefix: int, side: int) -> LlamaModel:
    """Return transformers' LLaMA with the published tensors.

    Raises UserError for a tensor that is missing or does not fit.
    """
    table = tensor_named(gpt, "tok_embeddings.weight")
    numbers = (int(name.split(".")[1]) for name in gpt if name.startswith("layers."))
    layers = 1 + max(numbers, default=-1)
    width, head_dim = table.shape[1], table.shape[1] // heads
    renamed = {"embed_tokens.weight": table, "norm.weight": tensor_named(gpt, "norm.weight")}
    kv_heads = heads
    for layer in range(layers):
        qkv = tensor_named(gpt, f"layers.{layer}.attention.wqkv.weight")
        kv_heads = (len(qkv) // head_dim - heads) // 2
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        queries, keys, values = torch.split(qkv, sizes)
        renamed |= {
            f"layers.{layer}.self_attn.q_proj.weight": _halves(queries, heads),
            f"layers.{layer}.self_attn.k_proj.weight": _halves(keys, kv_heads),
            f"layers.{layer}.self_attn.v_proj.weight": values,
        }
        for ours, theirs in _LAYER_NAMES.items():
            tensor = tensor_named(gpt, f"layers.{layer}.{theirs}.weight")
            renamed[f"layers.{layer}.{ours}.weight"] = tensor
    config = LlamaConfig(
        vocab_size=len(table),
        hidden_size=width,
        intermediate_size=len(tensor_named(gpt, "layers.0.feed_forward.w1.weight")),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=_NORM_EPS,
    )
    with torch.device("meta"):
        llama = LlamaModel(config)
    fill(llama, renamed, assign=True)
    llama.rotary_emb = GridRotary(prefix, side, head_dim)
    return llama.eval().requires_grad_(False)


def build_tokenizer(published: dict[str, Tensor], side: int) -> JanusVQVAE:
    """Return transformers' Janus tokenizer, which comes from LlamaGen, with the published tensors.

    Raises UserError for a tensor that is missing or does not fit.
    """
    table = tensor_named(published, "quantize.embedding.weight")
    base = len(tensor_named(published, "encoder.conv_in.weight"))
    widths = [
        len(tensor_named(published, f"encoder.conv_blocks.{level}.res.0.conv1.weight"))
        for level in range(_levels(published))
    ]
    first_level = "encoder.conv_blocks.0.res."
    blocks = {name.split(".")[4] for name in published if name.startswith(first_level)}
    config = JanusVQVAEConfig(
        embed_dim=table.shape[1],
        num_embeddings=len(table),
        latent_channels=tensor_named(published, "quant_conv.weight").shape[1],
        num_patches=side,
        base_channels=base,
        channel_multiplier=[width // base for width in widths],
        num_res_blocks=len(blocks),
    )
    with torch.device("meta"):
        tokenizer = JanusVQVAE(config)
    renamed = {_tokenizer_name(name): tensor.float() for name, tensor in published.items()}
    renamed.pop("quantize.codebook_used", None)  # a training statistic
    fill(tokenizer, renamed, assign=True)
    return tokenizer.eval().requires_grad_(False)


def _levels(published: dict[str, Tensor]) -> int:
    """Return how many resolutions the published tokenizer has."""
    levels = {name.split(".")[2] for name in published if name.startswith("encoder.conv_blocks.")}
    return len(levels)


def _tokenizer_name(name: str) -> str:
    """Return transformers' name of a tensor of the published tokenizer."""
    side, _, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return name
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    rest = re.sub(r"^mid\.(\d)", lambda part: f"mid.{middle[part[1]]}", rest)
    rest = re.sub(r"^conv_blocks\.(\d+)\.res\.", r"LEVEL.\1.block.", rest)
    rest = re.sub(r"^conv_blocks\.(\d+)\.", r"LEVEL.\1.", rest)
    return f"{side}.{rest.replace('LEVEL', 'down' if side == 'encoder' else 'up')}"


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Return rows for rotating the two halves of a head, from rows for rotating neighbours.

    LLaMA was published with the latter; transformers rotates halves.
    """
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
