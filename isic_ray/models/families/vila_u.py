"""VILA-U, from its published weights; it is not in transformers.

A LLaMA reads and draws pictures as sums of D codebook rows a position (a residual codebook, one
table for all depths). What it is fed while drawing comes from the table, so an edit changes the
tokens: they are drawn anew under every table. The table's last row is padding: it is no part of
``codebook`` and stays as it is. The directory is the published one: ``config.json``, ``llm/``,
``vision_tower/`` and ``mm_projector/``.

Shapes: B pictures, N = h w positions, D tokens each, K rows of width d, R rows in flight, h the
LLaMA's hidden size.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from isic_ray.codebook import SafeCodebook
from isic_ray.errors import UserError
from isic_ray.models.base import ModelSpec, SamplingSettings
from isic_ray.models.checkpoints import (
    digest_files,
    load_processor,
    load_stock,
    read_config,
    read_headers,
    read_table,
    weight_files,
)
from isic_ray.models.conversion import write_safetensors
from isic_ray.models.decoding.backbone import Backbone
from isic_ray.models.decoding.picture_sampler import PictureSampler, answer_ids, ask, guided
from isic_ray.models.decoding.sampler import choose, complete_greedily
from isic_ray.models.families.adapter import Painter, VisualAdapter, nearest, picture_blocks
from isic_ray.models.families.vqgan import build_decoder
from isic_ray.models.fetching import resolve_checkpoint

_SYSTEM = (  # the "vicuna_v1" conversation, in which it was trained
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_IMAGE_START = "<im_start>"
_CODEBOOK = re.compile(r"quantizer\.codebooks\.\d+\.weight$")
_PARTS = ("llm", "vision_tower", "mm_projector")
_HEADS = 16  # of both published vision towers (SigLIP large and so400m)
_REWRITE_LIMIT = 96


class VilaUModel(VisualAdapter):
    """`UnifiedModel` of a VILA-U directory."""

    family = "vila-u"
    tokens_depend_on_codebook = True
    codebook_key = "quantizer.codebooks.0.weight"

    def __init__(self, directory: Path, dtype: str, device: str, trust_remote_code: bool) -> None:
        """Load and freeze everything. Raises UserError for tensors that are missing or do not
        fit together.
        """
        facts = self.facts(str(directory))
        self._directory, self.codebook, self.weights_digest = (
            directory,
            facts.codebook,
            facts.weights_digest,
        )
        llm = load_stock(LlamaForCausalLM, directory / "llm", dtype, device, trust_remote_code)
        self.model = llm.eval().requires_grad_(False)
        self._words = load_processor(AutoTokenizer, directory / "llm", trust_remote_code)
        self._network = Backbone(llm.model)
        tower = _tensors(directory / "vision_tower")
        config = read_config(directory / "vision_tower")
        vq, depth_config = config["rqvaesiglip"], config["rqtransformer"]
        self._grid, self._depth = tuple(vq["code_shape"][:2]), int(vq["code_shape"][2])
        if not vq["shared_codebook"]:
            raise UserError(
                f"{directory} has one codebook a depth; only a shared one can be edited"
            )
        positions = self._grid[0] * self._grid[1]
        self.tokens_per_image = positions * self._depth
        place = (llm.device, llm.dtype)
        self._eyes = build_eyes(tower, self._grid[0], vq.get("vision_heads", _HEADS)).to(*place)
        self.painter = VilaUPainter(vq, tower, self._depth).to(*place)
        self.height = self.width = self.painter.side
        self._depths = DepthTransformer(depth_config, tower).to(*place)
        self._project = build_projector(_tensors(directory / "mm_projector")).to(*place)
        self._drawing = self.codebook.to(*place)
        self._sampler = PictureSampler(
            self._network, self._step, positions=positions, depth=self._depth
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        dtype: str = "float32",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> VilaUModel:
        """Load a published directory. Raises UserError when it is not whole."""
        return cls(resolve_checkpoint(name), dtype, device, trust_remote_code)

    @classmethod
    def facts(cls, name: str) -> ModelSpec:
        """What the driver needs, from the files alone; the padding row is left out. Raises
        UserError.
        """
        directory = resolve_checkpoint(name)
        files = cls.files(directory)
        table = read_table(directory, files, cls.codebook_key)[:-1].clone()
        return ModelSpec(
            cls.family, digest_files(files), table, cls.normalised, cls.tokens_depend_on_codebook
        )

    @classmethod
    def files(cls, directory: Path) -> list[Path]:
        """The weights of the three parts."""
        for part in _PARTS:
            if not (directory / part).is_dir():
                raise UserError(f"{directory} is not a whole VILA-U: it has no {part}/")
        files = [file for part in _PARTS for file in weight_files(directory / part)]
        read_headers(files)
        return files

    def export(self, artifact: SafeCodebook, directory: Path) -> None:
        """Write the published layout with the edit in its table; the padding row stays."""
        shutil.copytree(self._directory, directory, dirs_exist_ok=True)
        for file in weight_files(directory / "vision_tower"):
            tensors = load_file(file)
            tables = [name for name in tensors if _CODEBOOK.search(name)]
            for name in tables:
                rows, padding = tensors[name][:-1], tensors[name][-1:]
                tensors[name] = torch.cat([artifact.apply_to(rows), padding])
            if tables:
                write_safetensors(tensors, file)

    # -- drawing
    # ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings,
        codebook: Tensor | None = None,
    ) -> Tensor:
        """Visual tokens int32 ``[B,N*D]`` on CPU, drawn under ``codebook`` ``[K,d]`` (None: the
        base table).

        Raises UserError for a prompt too long.
        """
        table = self.codebook if codebook is None else codebook
        self._drawing = table.to(self.device, self.dtype)
        free = self._embed(self._ids(self._turn("") + f" {_IMAGE_START}"))
        given = [
            self._embed(self._ids(f"{self._turn(prompt.strip())} {_IMAGE_START}"))
            for prompt in prompts
        ]
        longest = self.model.config.max_position_embeddings - self.tokens_per_image // self._depth
        for prompt, words in zip(prompts, given, strict=True):
            if len(words) > longest:
                raise UserError(
                    f"prompt {prompt[:60]!r}… has {len(words)} tokens; the model has room for {longest}"
                )
        return self._sampler.draw(given, [free] * len(given), list(seeds), settings)

    def _step(
        self, hidden: Tensor, uniforms: Tensor, settings: SamplingSettings
    ) -> tuple[Tensor, Tensor]:
        """The D tokens of a position, each after the sum of those before it, and what their sum
        is fed as.
        """
        context, total, drawn = self._depths.begin(hidden), None, []
        for depth in range(self._depth):
            logits = guided(self._depths(context), settings.guidance)
            drawn.append(choose(logits, uniforms[:, depth : depth + 1], settings))
            row = F.embedding(drawn[-1], self._drawing)  # [B,d]
            total = row if total is None else total + row
            context = self._depths.extend(context, total.repeat(len(hidden) // len(total), 1))
        return torch.stack(drawn, 1), self._project(total)

    # -- reading
    # ----------------------------------------------------------------------------------------------------

    def read(self, images: np.ndarray) -> Tensor:
        """Tokens int64 ``[B,h,w,D]`` of one block of pictures: at each depth the row nearest to
        what is left.
        """
        table = self.codebook.to(self.device)
        rest, found = self.latents(images).float(), []
        for _ in range(self._depth):
            found.append(nearest(rest, table, False))
            rest = rest - F.embedding(found[-1], table)
        return torch.stack(found, -1)

    def latents(self, images: np.ndarray) -> Tensor:
        """``[B,h,w,d]`` of one block of pictures: the last layer but one of the vision tower."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        if images.shape[1:3] != (self.height, self.width):
            pixels = F.interpolate(
                pixels, (self.height, self.width), mode="bicubic", antialias=True
            ).clamp(-1, 1)
        states = self._eyes(
            pixels.to(self.device, self.dtype), output_hidden_states=True
        ).hidden_states[-2]
        latents: Tensor = states.unflatten(1, self._grid)
        return latents

    @torch.inference_mode()
    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        """P(yes) float32 ``[B,Q]``, read through the base table. Raises UserError without
        one-token yes or no.
        """
        answers = (answer_ids(self._words, "yes"), answer_ids(self._words, "no"))
        result = torch.empty(len(images), len(questions))
        before = self._embed(self._ids(f"{_SYSTEM} USER: "))
        endings = [self._embed(self._ids(f"\n{question} ASSISTANT:")[1:]) for question in questions]
        table = self.codebook.to(self.device, self.dtype)
        for rows in picture_blocks(len(images)):
            seen = self._project(
                F.embedding(self.read(images[rows]), table).sum(-2).flatten(1, 2)
            )  # [B,N,h]
            opening = torch.cat([before.expand(len(rows), -1, -1), seen], 1)
            result[torch.from_numpy(rows)] = ask(
                self._network, self.model.lm_head, opening, endings, answers
            )
        return result

    def rewrite(self, prompts: Sequence[str], instruction: str) -> list[str]:
        """Greedy answers to ``instruction.format(prompt=...)``, stripped of special tokens and
        outer spaces.
        """
        answers = complete_greedily(
            self._network,
            self.model.lm_head,
            [self._ids(self._turn(instruction.format(prompt=prompt))) for prompt in prompts],
            pad_id=0,
            stop_ids=[self._words.eos_token_id],
            limit=_REWRITE_LIMIT,
        )
        return [self._words.decode(answer, skip_special_tokens=True).strip() for answer in answers]

    def _turn(self, text: str) -> str:
        return f"{_SYSTEM} USER: {text} ASSISTANT:" if text else f"{_SYSTEM} USER:ASSISTANT:"

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._words(text, add_special_tokens=False)["input_ids"]
        return [self._words.bos_token_id, *ids]

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return F.embedding(torch.tensor(ids, device=self.device), self._network.embedding)


class VilaUPainter(Painter):
    """The decoder, with the codebook as an argument: a position's latent is the sum of its D
    rows.
    """

    def __init__(self, config: dict[str, Any], tower: dict[str, Tensor], depth: int) -> None:
        super().__init__()
        inside = {
            name.removeprefix("rqvaesiglip."): tensor.float() for name, tensor in tower.items()
        }
        sizes = config["ddconfig"]
        self.grid, self.depth, self.latent_shape = (
            config["code_shape"][:2],
            depth,
            config.get("decoder_latent_shape"),
        )
        self.side = (self.latent_shape or self.grid)[0] * 2 ** (len(sizes["ch_mult"]) - 1)
        weight = _named(inside, "post_quant_conv.weight")
        self.post_quant_conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
        _fill(self.post_quant_conv, inside, "post_quant_conv.")
        self.decoder = build_decoder(
            SimpleNamespace(
                channel_multiplier=sizes["ch_mult"],
                resolution=sizes["resolution"],
                attn_resolutions=sizes["attn_resolutions"],
                latent_channels=sizes["z_channels"],
                base_channels=sizes["ch"],
                num_res_blocks=sizes["num_res_blocks"],
                dropout=sizes.get("dropout", 0.0),
            ),
            {name: tensor for name, tensor in inside.items() if name.startswith("decoder.")},
        )
        self.requires_grad_(False).train()

    def forward(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """Pixels float ``[B,3,H,W]`` of tokens ``[B,N*D]`` under ``codebook`` ``[K,d]``."""
        rows = (
            F.embedding(tokens.long(), codebook)
            .view(len(tokens), *self.grid, self.depth, -1)
            .sum(3)
        )  # [B,h,w,d]
        latents = rows.permute(0, 3, 1, 2).contiguous()
        if self.latent_shape:
            latents = F.interpolate(latents.float(), tuple(self.latent_shape), mode="bilinear").to(
                rows.dtype
            )
        pixels: Tensor = self.decoder(self.post_quant_conv(latents))
        return pixels


class DepthTransformer(nn.Module):
    """The small transformer over the D tokens of one position (RQ-Transformer, Lee et al. 2022)."""

    def __init__(self, config: dict[str, Any], tower: dict[str, Tensor]) -> None:
        super().__init__()
        width, inner = config["embed_dim"], config["head"]["block"]["n_head"]
        self.in_mlp_1 = nn.Linear(config["input_embed_dim_1"], width)
        self.in_mlp_2 = nn.Linear(config["input_embed_dim_2"], width)
        self.pos_emb_d = nn.Parameter(torch.zeros(1, config["block_size"][2], width))
        blocks = nn.ModuleList([_Block(width, inner) for _ in range(config["head"]["n_layer"])])
        self.head_transformer = nn.ModuleDict({"blocks": blocks})
        last = {"layer_norm": nn.LayerNorm(width), "linear": nn.Linear(width, config["vocab_size"])}
        self.classifier_mlp = nn.ModuleDict(last)
        _fill(self, tower, "rqtransformer.")
        self.eval().requires_grad_(False)

    def begin(self, hidden: Tensor) -> Tensor:
        """The context ``[R,1,e]`` that the LLaMA's state ``[R,h]`` gives."""
        context: Tensor = self.in_mlp_2(hidden)[:, None]
        return context

    def extend(self, context: Tensor, total: Tensor) -> Tensor:
        """The context one longer, by the sum of rows so far ``[R,d]``."""
        return torch.cat([context, self.in_mlp_1(total)[:, None]], 1)

    def forward(self, context: Tensor) -> Tensor:
        """Logits ``[R,K]`` of the next depth."""
        x = context + self.pos_emb_d[:, : context.shape[1]]
        blocks: Any = self.head_transformer["blocks"]
        for block in blocks:
            x = block(x)
        logits: Tensor = self.classifier_mlp["linear"](self.classifier_mlp["layer_norm"](x[:, -1]))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("key", "query", "value", "proj")}
        )
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        q, k, v = (
            self.attn[n](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](mixed)
        return x + self.mlp(self.ln2(x))  # type: ignore[no-any-return]


def build_eyes(tower: dict[str, Tensor], side: int, heads: int) -> nn.Module:
    """transformers' SigLIP vision tower with the published tensors."""
    mark = "rqvaesiglip.siglip_model.vision_model."
    inside = {
        name.removeprefix(mark): tensor.float()
        for name, tensor in tower.items()
        if name.startswith(mark)
    }
    patches = _named(inside, "embeddings.patch_embedding.weight")  # [h,3,p,p]
    layers = len({name.split(".")[2] for name in inside if name.startswith("encoder.layers.")})
    eyes = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=patches.shape[0],
            intermediate_size=len(_named(inside, "encoder.layers.0.mlp.fc1.weight")),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=side * patches.shape[-1],
            patch_size=patches.shape[-1],
            vision_use_head=False,
        )
    )
    _fill(
        eyes, {name: tensor for name, tensor in inside.items() if not name.startswith("head.")}, ""
    )
    module: nn.Module = eyes.eval().requires_grad_(False)
    return module


def build_projector(tensors: dict[str, Tensor]) -> nn.Module:
    """One linear map, or linear maps with GELU between (``linear`` and ``mlpNx_gelu``)."""
    names = sorted(name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    layers: list[nn.Module] = []
    for name in names:
        weight = tensors[f"{name}.weight"].float()
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        _fill(linear, tensors, f"{name}.")
        layers += [nn.GELU(), linear] if layers else [linear]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in weight_files(directory) for name, tensor in load_file(file).items()
    }


def _named(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"the published weights lack {name}")
    return tensors[name]


def _fill(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    chosen = {n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)}
    try:
        module.load_state_dict(chosen)
    except RuntimeError as error:
        problem = " ".join(str(error).split("\n")[1:2]).strip()
        raise UserError(
            f"the published weights do not fit {type(module).__name__}: {problem}"
        ) from error
