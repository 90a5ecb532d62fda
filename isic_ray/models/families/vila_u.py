"""VILA-U, from its published weights; it is not in transformers.

A LLaMA reads and draws pictures as sums of D codebook rows per position (a residual codebook, one
table for all depths). What it is fed while drawing comes from the table, so an edit changes the
tokens: they are drawn again under every table. The table's last row is padding: it is no part of
``codebook`` and stays as it is. The directory is the published one: ``config.json``, ``llm/``,
``vision_tower/`` and ``mm_projector/``.

Shapes: B pictures of h by w positions, N of them, with D tokens each; K codebook rows of width d;
L words of a prompt; R rows in flight; e the LLaMA's hidden size.
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
from isic_ray.models.base import SamplingSettings
from isic_ray.models.checkpoints import (
    load_processor,
    load_stock,
    read_config,
    read_headers,
    weight_files,
)
from isic_ray.models.conversion import write_safetensors
from isic_ray.models.decoding.asking import answer_ids, ask
from isic_ray.models.decoding.backbone import Backbone
from isic_ray.models.decoding.choice import choose, guided
from isic_ray.models.decoding.picture_sampler import PictureSampler
from isic_ray.models.decoding.text import answer_in_text
from isic_ray.models.families.adapter import (
    Painter,
    VisualAdapter,
    check_prompt_lengths,
    nearest,
    picture_blocks,
    pixels_of,
)
from isic_ray.models.families.published import fill, inside, tensor_named
from isic_ray.models.families.rq_transformer import DepthTransformer
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


class VilaUModel(VisualAdapter):
    """`UnifiedModel` of a VILA-U directory."""

    family = "vila-u"
    tokens_depend_on_codebook = True
    codebook_key = "quantizer.codebooks.0.weight"

    def __init__(self, directory: Path, dtype: str, device: str, trust_remote_code: bool) -> None:
        """Load and freeze everything.

        Raises UserError for tensors that are missing or do not fit together.
        """
        spec = self.spec(str(directory))
        self.codebook, self.weights_digest = spec.codebook, spec.weights_digest
        self._directory = directory
        llm = load_stock(LlamaForCausalLM, directory / "llm", dtype, device, trust_remote_code)
        self.model = llm.eval().requires_grad_(False)
        self._words = load_processor(AutoTokenizer, directory / "llm", trust_remote_code)
        self._network = Backbone(llm.model)
        tower = _tensors(directory / "vision_tower")
        config = read_config(directory / "vision_tower")
        vq = config["rqvaesiglip"]
        if not vq["shared_codebook"]:
            raise UserError(
                f"{directory} has one codebook for each depth; only a shared one can be edited"
            )
        self._grid, self._depth = tuple(vq["code_shape"][:2]), int(vq["code_shape"][2])
        positions = self._grid[0] * self._grid[1]
        self.tokens_per_image = positions * self._depth
        place = (llm.device, llm.dtype)
        self._eyes = build_eyes(tower, self._grid[0], vq.get("vision_heads", _HEADS)).to(*place)
        self.painter = VilaUPainter(vq, tower).to(*place)
        self.height = self.width = self.painter.side
        self._depths = DepthTransformer(config["rqtransformer"], tower).to(*place)
        self._project = build_projector(_tensors(directory / "mm_projector")).to(*place)
        self._drawing = self.codebook.to(*place)  # the table that `sample` draws under
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
    def files(cls, directory: Path) -> list[Path]:
        """Return the weight files of the three parts."""
        for part in _PARTS:
            if not (directory / part).is_dir():
                raise UserError(f"{directory} is not a whole VILA-U: it has no {part}/")
        files = [file for part in _PARTS for file in weight_files(directory / part)]
        read_headers(files)
        return files

    @classmethod
    def read_codebook(cls, directory: Path) -> Tensor:
        """Return the codebook float32 ``[K,d]`` without its padding row."""
        return super().read_codebook(directory)[:-1].clone()

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

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings,
        codebook: Tensor | None = None,
    ) -> Tensor:
        """Return visual tokens int32 ``[B,N*D]`` on CPU, drawn under ``codebook`` ``[K,d]``.

        None is the base table. Raises UserError for a prompt too long.
        """
        table = self.codebook if codebook is None else codebook
        self._drawing = table.to(self.device, self.dtype)
        free = self._embed(self._ids(f"{self._turn('')} {_IMAGE_START}"))
        given = [
            self._embed(self._ids(f"{self._turn(prompt.strip())} {_IMAGE_START}"))
            for prompt in prompts
        ]
        room = self.model.config.max_position_embeddings - self.tokens_per_image // self._depth
        check_prompt_lengths(prompts, given, room)
        return self._sampler.draw(given, [free] * len(given), list(seeds), settings)

    def _step(
        self, hidden: Tensor, uniforms: Tensor, settings: SamplingSettings
    ) -> tuple[Tensor, Tensor]:
        """Return the D tokens of a position ``[B,D]``, and what is fed for them ``[B,e]``.

        Each token follows the sum of the rows of those before it. ``hidden`` is ``[R,e]``,
        ``uniforms`` ``[B,D]``.
        """
        context, total, drawn = self._depths.begin(hidden), None, []
        for depth in range(self._depth):
            logits = guided(self._depths(context), settings.guidance)
            drawn.append(choose(logits, uniforms[:, depth : depth + 1], settings))
            row = F.embedding(drawn[-1], self._drawing)  # [B,d]
            total = row if total is None else total + row
            context = self._depths.extend(context, total.repeat(len(hidden) // len(total), 1))
        return torch.stack(drawn, 1), self._project(total)

    def read(self, images: np.ndarray) -> Tensor:
        """Return tokens int64 ``[B,h,w,D]`` of one block of pictures.

        At each depth it is the row nearest to what is left.
        """
        table = self.codebook.to(self.device)
        rest, found = self.latents(images).float(), []
        for _ in range(self._depth):
            found.append(nearest(rest, table, False))
            rest = rest - F.embedding(found[-1], table)
        return torch.stack(found, -1)

    def latents(self, images: np.ndarray) -> Tensor:
        """Return ``[B,h,w,d]`` of one block of pictures: the vision tower's last layer but one."""
        pixels, size = pixels_of(images), (self.height, self.width)
        if images.shape[1:3] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)
        seen = self._eyes(pixels.to(self.device, self.dtype), output_hidden_states=True)
        latents: Tensor = seen.hidden_states[-2].unflatten(1, self._grid)
        return latents

    @torch.inference_mode()
    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        """Return P(yes) float32 ``[B,Q]``, over all one-token spellings of yes and no.

        Pictures are read through the base table. Raises UserError when the tokenizer has no
        one-token yes or no.
        """
        answers = answer_ids(self._words, "yes"), answer_ids(self._words, "no")
        result = torch.empty(len(images), len(questions))
        before = self._embed(self._ids(f"{_SYSTEM} USER: "))
        endings = [self._embed(self._ids(f"\n{question} ASSISTANT:")[1:]) for question in questions]
        table = self.codebook.to(self.device, self.dtype)
        for rows in picture_blocks(len(images)):
            latents = F.embedding(self.read(images[rows]), table).sum(-2)
            seen = self._project(latents.flatten(1, 2))  # [B,N,e]
            opening = torch.cat([before.expand(len(rows), -1, -1), seen], 1)
            scores = ask(self._network, self.model.lm_head, opening, endings, answers)
            result[torch.from_numpy(rows)] = scores
        return result

    def rewrite(self, prompts: Sequence[str], instruction: str) -> list[str]:
        """Return the greedy answer to each ``instruction.format(prompt=...)``, stripped."""
        return answer_in_text(
            self._network,
            self.model.lm_head,
            self._words,
            [self._ids(self._turn(instruction.format(prompt=prompt))) for prompt in prompts],
            pad_id=0,
            eos=self._words.eos_token_id,
        )

    def _turn(self, text: str) -> str:
        """Return the conversation up to the assistant's answer to ``text``."""
        return f"{_SYSTEM} USER: {text} ASSISTANT:" if text else f"{_SYSTEM} USER:ASSISTANT:"

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._words(text, add_special_tokens=False)["input_ids"]
        return [self._words.bos_token_id, *ids]

    def _embed(self, ids: Sequence[int]) -> Tensor:
        """Return the embeddings ``[L,e]`` of words."""
        return F.embedding(torch.tensor(ids, device=self.device), self._network.embedding)


class VilaUPainter(Painter):
    """The decoder, with the codebook as an argument: a position's latent is a sum of D rows."""

    def __init__(self, config: dict[str, Any], tower: dict[str, Tensor]) -> None:
        """Build it by the published ``rqvaesiglip`` config and tensors.

        Raises UserError when they do not fit.
        """
        super().__init__()
        tensors, sizes = inside(tower, "rqvaesiglip."), config["ddconfig"]
        self.code_shape: list[int] = config["code_shape"]  # h, w, D
        self.latent_shape: list[int] | None = config.get("decoder_latent_shape")
        lowest = (self.latent_shape or self.code_shape)[0]
        self.side = lowest * 2 ** (len(sizes["ch_mult"]) - 1)
        weight = tensor_named(tensors, "post_quant_conv.weight")
        self.post_quant_conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
        fill(self.post_quant_conv, inside(tensors, "post_quant_conv."))
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
            {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")},
        )
        self.requires_grad_(False).train()

    def forward(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """Return pixels float ``[B,3,H,W]`` of tokens ``[B,N*D]`` under ``codebook`` ``[K,d]``."""
        rows = F.embedding(tokens.long(), codebook)
        summed = rows.view(len(tokens), *self.code_shape, -1).sum(3)  # [B,h,w,d]
        latents = summed.permute(0, 3, 1, 2).contiguous()
        if self.latent_shape:
            size = tuple(self.latent_shape)
            latents = F.interpolate(latents.float(), size, mode="bilinear").to(rows.dtype)
        pixels: Tensor = self.decoder(self.post_quant_conv(latents))
        return pixels


def build_eyes(tower: dict[str, Tensor], side: int, heads: int) -> nn.Module:
    """Return transformers' SigLIP vision tower with the published tensors; frozen.

    Raises UserError for a tensor that is missing or does not fit.
    """
    tensors = inside(tower, "rqvaesiglip.siglip_model.vision_model.")
    patches = tensor_named(tensors, "embeddings.patch_embedding.weight")  # [width,3,p,p]
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}
    eyes = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=patches.shape[0],
            intermediate_size=len(tensor_named(tensors, "encoder.layers.0.mlp.fc1.weight")),
            num_hidden_layers=len(layers),
            num_attention_heads=heads,
            image_size=side * patches.shape[-1],
            patch_size=patches.shape[-1],
            vision_use_head=False,
        )
    )
    fill(eyes, {name: value for name, value in tensors.items() if not name.startswith("head.")})
    module: nn.Module = eyes.eval().requires_grad_(False)
    return module


def build_projector(tensors: dict[str, Tensor]) -> nn.Module:
    """Return one linear map, or several with GELU between (``linear`` and ``mlpNx_gelu``)."""
    names = sorted(name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    layers: list[nn.Module] = []
    for name in names:
        rows, columns = tensors[f"{name}.weight"].shape
        linear = nn.Linear(columns, rows)
        fill(linear, inside(tensors, f"{name}."))
        layers += [nn.GELU(), linear] if layers else [linear]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _tensors(directory: Path) -> dict[str, Tensor]:
    """Return every tensor of a part of the checkpoint, by published name."""
    found: dict[str, Tensor] = {}
    for file in weight_files(directory):
        found |= load_file(file)
    return found
