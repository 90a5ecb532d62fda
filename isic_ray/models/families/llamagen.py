"""LlamaGen (text to image), from its published weights; it is not in transformers.

Its transformer is a LLaMA with rotary positions over the picture's grid, and its tokenizer is the
one that Janus took over, so both run on transformers' modules, with the published tensors under
other names. A directory made by `isic convert` holds: ``config.json``, ``model.safetensors`` and
``vq.safetensors`` (the published tensors by their published names), and ``text_encoder/`` (FLAN-T5
with its tokenizer). It draws only: give judge.model.

Prompts are put in lower case, as in the published option without caption cleaning.
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
    read_table,
    resolve_device,
    resolve_dtype,
    weight_files,
)
from isic_ray.models.conversion import write_safetensors
from isic_ray.models.decoding.backbone import Backbone
from isic_ray.models.decoding.picture_sampler import PictureSampler, one_token
from isic_ray.models.families.adapter import Painter, VisualAdapter, picture_blocks, rows_as_map
from isic_ray.models.fetching import resolve_checkpoint

GPT, VQ, TEXT_ENCODER = "model.safetensors", "vq.safetensors", "text_encoder"
_NORM_EPS, _ROPE_BASE = 1e-5, 10000.0


class LlamaGenModel(VisualAdapter):
    """The drawing half of a `UnifiedModel`; ``.model`` is the tokenizer, whose table an edit
    changes.
    """

    family = "llamagen"
    normalised = True
    codebook_key = "quantize.embedding.weight"

    def __init__(
        self, directory: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
    ) -> None:
        """Load and freeze everything. Raises UserError for tensors that are missing or do not
        fit together.
        """
        self._directory = directory
        self.codebook = read_table(directory, [directory / VQ], self.codebook_key)
        config = read_config(directory)
        gpt = load_file(directory / GPT)
        tokenizer = load_file(directory / VQ)
        side = int(config["image_size"]) // 2 ** (_levels(tokenizer) - 1)
        self.model = build_tokenizer(tokenizer, side).to(device)
        self.tokens_per_image, self.height, self.width = (
            side**2,
            config["image_size"],
            config["image_size"],
        )
        self.painter = LlamaGenPainter(self.model, side)
        self._encoder = load_stock(
            T5EncoderModel,
            directory / TEXT_ENCODER,
            str(dtype).removeprefix("torch."),
            str(device),
            trust_remote_code,
        ).requires_grad_(False)
        self._words = load_processor(AutoTokenizer, directory / TEXT_ENCODER, trust_remote_code)
        prefix = len(_tensor(gpt, "cls_embedding.uncond_embedding"))
        llama = build_transformer(gpt, int(config["heads"]), prefix, side).to(device, dtype)
        caption = (_tensor(gpt, f"cls_embedding.cap_proj.{name}.weight") for name in ("fc1", "fc2"))
        self._caption = [weight.to(device, dtype) for weight in caption]
        self._free = self._project(
            _tensor(gpt, "cls_embedding.uncond_embedding").to(device, dtype)
        )  # [P,h]
        head = _tensor(gpt, "output.weight").to(device, dtype)
        if head.shape[0] != len(self.codebook):
            raise UserError(
                f"{directory}: the model draws {head.shape[0]} tokens, the table has {len(self.codebook)} rows"
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
        """Load a directory made by `isic convert`. Raises UserError when it is not whole."""
        directory = resolve_checkpoint(name)
        files = cls.files(directory)
        model = cls(directory, resolve_dtype(dtype), resolve_device(device), trust_remote_code)
        model.weights_digest = digest_files(files)
        return model

    @classmethod
    def files(cls, directory: Path) -> list[Path]:
        """Transformer, tokenizer and text encoder."""
        for name in (GPT, VQ):
            if not (directory / name).is_file():
                raise UserError(
                    f"{directory} has no {name}; make it with `isic convert` from the published files"
                )
        files = [directory / GPT, directory / VQ, *weight_files(directory / TEXT_ENCODER)]
        read_headers(files)
        return files

    def export(self, artifact: SafeCodebook, directory: Path) -> None:
        """Write a directory that this adapter loads, and ``vq.pt`` as the original code loads
        it, with the edit.
        """
        shutil.copytree(self._directory, directory, dirs_exist_ok=True)
        tensors = load_file(self._directory / VQ)
        tensors[self.codebook_key] = artifact.apply_to(tensors[self.codebook_key])
        write_safetensors(tensors, directory / VQ)
        torch.save({"model": tensors}, directory / "vq.pt")

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
    ) -> Tensor:
        """Visual tokens int32 ``[B,N]`` on CPU; see `UnifiedModel.sample`. Long prompts are cut,
        as published.
        """
        conditions = self._conditions([prompt.lower().strip() for prompt in prompts])
        free = [self._free[len(self._free) - len(condition) :] for condition in conditions]
        return self._sampler.draw(conditions, free, list(seeds), settings)

    def latents(self, images: np.ndarray) -> Tensor:
        """``[B,h,w,d]`` of one block of pictures."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents: Tensor = self.model.quant_conv(self.model.encoder(pixels.to(self.device)))
        return latents.permute(0, 2, 3, 1)

    @torch.inference_mode()
    def _conditions(self, texts: list[str]) -> list[Tensor]:
        """Embeddings ``[L,h]`` of each prompt: its words as the text encoder sees them,
        projected.
        """
        found: dict[int, Tensor] = {}
        for rows in picture_blocks(
            len(texts)
        ):  # blocks of one size, so that results do not depend on the batch
            words = self._words(
                [texts[i] for i in rows],
                max_length=len(self._free),
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).to(self._encoder.device)
            states = self._encoder(
                input_ids=words["input_ids"], attention_mask=words["attention_mask"]
            )[0]
            for row, state, mask in zip(
                rows.tolist(), states, words["attention_mask"].bool(), strict=True
            ):
                found[row] = self._project(state[mask])
        return [found[row] for row in range(len(texts))]

    def _project(self, states: Tensor) -> Tensor:
        first, second = self._caption
        return F.linear(F.gelu(F.linear(states, first), approximate="tanh"), second)


class LlamaGenPainter(Painter):
    """The tokenizer's decoder, with the codebook as an argument; rows are normalised."""

    def __init__(self, tokenizer: Any, side: int) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder, self.side = (
            tokenizer.post_quant_conv,
            tokenizer.decoder,
            side,
        )
        self.train()

    def forward(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """Pixels float ``[B,3,H,W]`` of tokens ``[B,N]`` under ``codebook`` ``[K,d]``."""
        latents = F.normalize(rows_as_map(tokens, codebook, self.side, self.side), dim=1)
        pixels: Tensor = self.decoder(self.post_quant_conv(latents))
        return pixels


class GridRotary(nn.Module):
    """Rotary angles by the row and column of a picture token; the prompt's slots come first and are
    turned to zero.

    Zero is what the published model has there: a prompt's keys and queries vanish, so it is
    attended to evenly.
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
            self.register_buffer(
                name, F.pad(values, (0, 0, prefix, 0)), persistent=False
            )  # [P+N,D]

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[R,T,D]`` of slots 0 to T - 1: ``positions`` ``[R,T]`` gives the
        shape only.
        """
        rows, slots = positions.shape
        cos, sin = (
            table[:slots].to(x.device, x.dtype).repeat(rows, 1, 1) for table in (self.cos, self.sin)
        )
        return cos, sin


def build_transformer(gpt: dict[str, Tensor], heads: int, prefix: int, side: int) -> LlamaModel:
    """transformers' LLaMA with the published tensors. Raises UserError for one that is missing
    or does not fit.
    """
    table = _tensor(gpt, "tok_embeddings.weight")
    layers = 1 + max(
        (int(name.split(".")[1]) for name in gpt if name.startswith("layers.")), default=-1
    )
    width, head_dim = table.shape[1], table.shape[1] // heads
    renamed = {"embed_tokens.weight": table, "norm.weight": _tensor(gpt, "norm.weight")}
    kv_heads = heads
    for layer in range(layers):
        qkv = _tensor(gpt, f"layers.{layer}.attention.wqkv.weight")
        kv_heads = (len(qkv) // head_dim - heads) // 2
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        queries, keys, values = torch.split(qkv, sizes)
        renamed |= {
            f"layers.{layer}.self_attn.q_proj.weight": _halves(queries, heads),
            f"layers.{layer}.self_attn.k_proj.weight": _halves(keys, kv_heads),
            f"layers.{layer}.self_attn.v_proj.weight": values,
        }
        for ours, theirs in _LAYER_NAMES.items():
            renamed[f"layers.{layer}.{ours}.weight"] = _tensor(
                gpt, f"layers.{layer}.{theirs}.weight"
            )
    config = LlamaConfig(
        vocab_size=len(table),
        hidden_size=width,
        intermediate_size=len(_tensor(gpt, "layers.0.feed_forward.w1.weight")),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=_NORM_EPS,
    )
    with torch.device("meta"):
        llama = LlamaModel(config)
    _fill(llama, renamed)
    llama.rotary_emb = GridRotary(prefix, side, head_dim)
    return llama.eval().requires_grad_(False)


_LAYER_NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def build_tokenizer(published: dict[str, Tensor], side: int) -> JanusVQVAE:
    """transformers' Janus tokenizer, which was taken over from LlamaGen, with the published
    tensors.
    """
    table, first = (
        _tensor(published, "quantize.embedding.weight"),
        _tensor(published, "encoder.conv_in.weight"),
    )
    names = [
        f"encoder.conv_blocks.{level}.res.0.conv1.weight" for level in range(_levels(published))
    ]
    widths = [len(_tensor(published, name)) for name in names]
    blocks = len(
        {name.split(".")[4] for name in published if name.startswith("encoder.conv_blocks.0.res.")}
    )
    config = JanusVQVAEConfig(
        embed_dim=table.shape[1],
        num_embeddings=len(table),
        latent_channels=_tensor(published, "quant_conv.weight").shape[1],
        num_patches=side,
        base_channels=len(first),
        channel_multiplier=[width // len(first) for width in widths],
        num_res_blocks=blocks,
    )
    with torch.device("meta"):
        tokenizer = JanusVQVAE(config)
    renamed = {}
    for name, tensor in published.items():
        renamed[_tokenizer_name(name)] = tensor.float()
    renamed.pop("quantize.codebook_used", None)  # a training statistic
    _fill(tokenizer, renamed)
    return tokenizer.eval().requires_grad_(False)


def _levels(published: dict[str, Tensor]) -> int:
    return len(
        {name.split(".")[2] for name in published if name.startswith("encoder.conv_blocks.")}
    )


def _tokenizer_name(name: str) -> str:
    side, _, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return name
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    rest = re.sub(r"^mid\.(\d)", lambda part: f"mid.{middle[part[1]]}", rest)
    rest = re.sub(r"^conv_blocks\.(\d+)\.res\.", r"LEVEL.\1.block.", rest)
    rest = re.sub(r"^conv_blocks\.(\d+)\.", r"LEVEL.\1.", rest)
    return f"{side}.{rest.replace('LEVEL', 'down' if side == 'encoder' else 'up')}"


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows for rotating the two halves of a head, from rows for rotating neighbours (as LLaMA
    was published).
    """
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _tensor(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"the published weights lack {name}")
    return tensors[name]


def _fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        problem = " ".join(str(error).split("\n")[1:2]).strip()
        raise UserError(
            f"the published weights do not fit {type(module).__name__}: {problem}"
        ) from error
