"""Janus and Janus-Pro (and the embedded model, a small Janus) through their transformers
checkpoint.

Results never depend on how the caller batches: pictures are handled in fixed blocks for the reason
that `isic_ray.models.decoding.sampler` explains. The codebook is an argument of decoding; the
model's own table stays as loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from isic_ray.codebook import SafeCodebook
from isic_ray.errors import UserError
from isic_ray.models.base import Judge, ModelSpec, Perceiver, Renderer, SamplingSettings
from isic_ray.models.checkpoints import (
    digest_files,
    load_processor,
    load_stock,
    read_model_type,
    read_table,
    weight_files,
)
from isic_ray.models.decoding.asking import after_questions, yes_share
from isic_ray.models.decoding.backbone import Backbone, Run, fuse
from isic_ray.models.decoding.sampler import BLOCK, ROWS, TokenSampler, complete_greedily
from isic_ray.models.families.adapter import picture_blocks
from isic_ray.models.families.perceive import TowerPerceiver
from isic_ray.models.fetching import resolve_checkpoint

_REWRITE_LIMIT = 96  # tokens of a rewritten prompt at the most
_CODEBOOK_KEY = "vqmodel.quantize.embedding.weight"


class JanusModel(Judge):
    """`UnifiedModel` over a transformers `JanusForConditionalGeneration` (``.model``) and its
    ``.processor``.
    """

    family = "janus"
    normalised = True
    tokens_depend_on_codebook = False

    def __init__(
        self,
        model: JanusForConditionalGeneration,
        processor: JanusProcessor,
        weights_digest: str,
        codebook: Tensor | None = None,
    ) -> None:
        """Take over ``model`` (in its dtype, on its device) and freeze it. ``codebook`` is the
        float32 master.

        Raises UserError when the processor and the model do not belong together.
        """
        self.model, self.processor, self.weights_digest = (
            model.eval().requires_grad_(False),
            processor,
            weights_digest,
        )
        self._core = core = model.model
        core.vqmodel.to(memory_format=torch.channels_last)  # what convolutions are fastest in
        table = core.vqmodel.quantize.embedding.weight
        self.codebook = (
            (table if codebook is None else codebook).detach().to("cpu", torch.float32).clone()
        )
        self.tokens_per_image: int = core.vision_model.config.num_image_tokens
        self._side: int = core.vqmodel.quantize.quant_state_dims[0]
        self._tokenizer = processor.tokenizer
        self._check_tokens()
        self._set_generation_defaults()
        self._backbone, self._lm_head = Backbone(core.language_model), fuse(model.lm_head)
        self._sampler = token_sampler(model, self._backbone)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        dtype: str = "float32",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> JanusModel:
        """Load "pictogram", a checkpoint directory or a hub name. Raises UserError when it is
        not a sound Janus.
        """
        directory = resolve_checkpoint(name)
        model_type = read_model_type(directory)
        if model_type != "janus":
            raise UserError(
                f"{directory} is not a Janus checkpoint: its model_type is {model_type!r}"
            )
        files = cls.files(directory)
        codebook = read_table(directory, files, _CODEBOOK_KEY)
        processor = load_processor(JanusProcessor, directory, trust_remote_code)
        model = load_stock(
            JanusForConditionalGeneration, directory, dtype, device, trust_remote_code
        )
        return cls(model, processor, digest_files(files), codebook)

    @classmethod
    def facts(cls, name: str) -> ModelSpec:
        """What the driver needs, from the files alone. Raises UserError when there is no
        codebook in them.
        """
        directory = resolve_checkpoint(name)
        files = cls.files(directory)
        codebook = read_table(directory, files, _CODEBOOK_KEY)
        return ModelSpec(
            cls.family, digest_files(files), codebook, cls.normalised, cls.tokens_depend_on_codebook
        )

    @classmethod
    def files(cls, directory: Path) -> list[Path]:
        """The weight files of a checkpoint, in the order in which they are digested."""
        return weight_files(directory)

    def export(self, artifact: SafeCodebook, directory: Path) -> None:
        """Write a checkpoint for stock transformers, with the edit in its table, into
        ``directory``.
        """
        artifact.apply(self.model)
        self.model.save_pretrained(directory)
        self.processor.save_pretrained(directory)

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
    ) -> Tensor:
        """Visual tokens int32 ``[B,N]`` on CPU; see `UnifiedModel.sample`. Raises UserError for
        a prompt too long.
        """
        ids = [self._prompt_ids([{"type": "text", "text": prompt}], "image") for prompt in prompts]
        longest = self.model.config.text_config.max_position_embeddings - self.tokens_per_image
        for prompt, row in zip(prompts, ids, strict=True):
            if len(row) > longest:
                raise UserError(
                    f"prompt {prompt[:60]!r}… has {len(row)} tokens; the model has room for {longest}"
                )
        return self._sampler.draw(ids, seeds, settings)

    @torch.no_grad()
    def decode(self, tokens: Tensor, codebook: Tensor | None = None) -> np.ndarray:
        """Pictures uint8 ``[B,H,W,3]`` of ``[B,N]`` under a table ``[K,d]``, as stock Janus holding
        that table draws.

        Raises ValueError for tokens or a codebook of another shape, or tokens outside the table.
        """
        table = self.codebook if codebook is None else codebook
        if table.shape != self.codebook.shape:
            raise ValueError(
                f"codebook is {tuple(table.shape)}; this model's is {tuple(self.codebook.shape)}"
            )
        if tokens.ndim != 2 or tokens.shape[1] != self.tokens_per_image:
            raise ValueError(
                f"tokens are {tuple(tokens.shape)}, expected [B,{self.tokens_per_image}]"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(table):
            raise ValueError(f"tokens must be in [0, {len(table)})")
        table = table.to(self.model.device, self.model.dtype)
        size = self._side * self._pixels_per_token
        pictures = np.empty((len(tokens), size, size, 3), dtype=np.uint8)
        vq = self._core.vqmodel
        for rows in picture_blocks(len(tokens)):
            block = tokens[rows].to(self.model.device)
            pixels = _render(vq.post_quant_conv, vq.decoder, block, table, self._side)
            levels = ((pixels.float() + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8)
            pictures[rows] = levels.permute(0, 2, 3, 1).cpu().numpy()
        return pictures

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> Tensor:
        """Tokens int32 ``[B,N]`` of pictures uint8 ``[B,H,W,3]``: the row of greatest cosine, as
        Janus was trained.

        (transformers' own quantiser compares with rows it does not normalise.) Raises ValueError
        for other sizes.
        """
        size = self._side * self._pixels_per_token
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"pictures are {images.shape}, expected [B,{size},{size},3]")
        vq = self._core.vqmodel
        rows_of_table = F.normalize(self.codebook.to(self.model.device), dim=-1)
        tokens = torch.empty(len(images), self.tokens_per_image, dtype=torch.int32)
        for rows in picture_blocks(len(images)):
            pixels = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents = vq.quant_conv(
                vq.encoder(pixels.to(self.model.device, self.model.dtype))
            ).float()
            cosines = (
                F.normalize(latents, dim=1).permute(0, 2, 3, 1).flatten(1, 2) @ rows_of_table.T
            )  # [B,N,K]
            tokens[rows] = cosines.argmax(-1).to("cpu", torch.int32)
        return tokens

    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        """P(yes) float32 ``[B,Q]``: the next token's mass on "yes" against "no", over all their
        one-token spellings.

        Raises UserError when the tokenizer has no one-token yes or no.
        """
        scores = self.judge_each(images, [questions] * len(images))
        return torch.tensor(scores, dtype=torch.float32).reshape(len(images), len(questions))

    @torch.inference_mode()
    def judge_each(
        self, images: np.ndarray, questions: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """`judge` with each picture's own questions: a picture is read once, then its questions
        one after another.
        """
        yes, no = self._answer_ids("yes"), self._answer_ids("no")
        texts = {
            text: self._question_ids(text)
            for text in dict.fromkeys(text for own in questions for text in own)
        }
        openings = {tuple(opening) for opening, _ in texts.values()}
        multiple = ROWS if self._sampler.elastic() else BLOCK
        scores = [[0.0] * len(own) for own in questions]
        for rows in picture_blocks(len(images), BLOCK):
            features = self._vision_features(images[rows])
            places = [
                (row, i, at)
                for row, i in enumerate(dict.fromkeys(rows.tolist()))
                for at in range(len(scores[i]))
            ]
            for opening in openings:
                picture = self._read_picture(list(opening), features)
                here = [
                    place
                    for place in places
                    if tuple(texts[questions[place[1]][place[2]]][0]) == opening
                ]
                asked = [(row, texts[questions[i][at]][1]) for row, i, at in here]
                for members, hidden in after_questions(picture, asked, multiple):
                    shares = yes_share(self._lm_head(hidden), yes, no).tolist()
                    for member, share in zip(members, shares, strict=False):  # the rest is filler
                        _, i, at = here[member]
                        scores[i][at] = share
        return scores

    def rewrite(self, prompts: Sequence[str], instruction: str) -> list[str]:
        """Greedy answers to ``instruction.format(prompt=...)``, stripped of special tokens and
        outer spaces.
        """
        texts = [instruction.format(prompt=prompt) for prompt in prompts]
        generation = self.model.generation_config
        eos = generation.eos_token_id
        answers = complete_greedily(
            self._backbone,
            self._lm_head,
            [self._prompt_ids([{"type": "text", "text": text}], "text") for text in texts],
            pad_id=generation.pad_token_id,
            stop_ids=eos if isinstance(eos, list) else [] if eos is None else [eos],
            limit=_REWRITE_LIMIT,
        )
        return [
            self._tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers
        ]

    def renderer(self) -> Renderer:
        """A float32 copy of the decoder, differentiable in the codebook."""
        return JanusRenderer(self._core.vqmodel)

    def perceiver(self) -> Perceiver:
        """A float32 copy of the vision tower, differentiable in the pixels."""
        tower, images = self._core.vision_model, self.processor.image_processor
        side = tower.config.image_size
        return TowerPerceiver(tower, (side, side), list(images.image_mean), list(images.image_std))

    @property
    def _pixels_per_token(self) -> int:
        return int(2 ** (len(self._core.vqmodel.config.channel_multiplier) - 1))

    def _check_tokens(self) -> None:
        expected = {"the VQ grid": self._side**2, "the processor": self.processor.num_image_tokens}
        for what, count in expected.items():
            if count != self.tokens_per_image:
                raise UserError(
                    f"the model draws {self.tokens_per_image} tokens a picture but {what} has {count}"
                )

    def _set_generation_defaults(self) -> None:
        """Complete the ids that generation needs; stock `generate` then works too, also after
        save and reload.
        """
        generation, tokenizer = self.model.generation_config, self._tokenizer
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(generation, name) is None:
                setattr(generation, name, getattr(tokenizer, name))
        if generation.pad_token_id is None or generation.bos_token_id is None:
            raise UserError(
                "the checkpoint's tokenizer has no padding or no beginning-of-sentence token"
            )
        kwargs = dict(getattr(generation, "generation_kwargs", None) or {})
        kwargs.setdefault(
            "boi_token_id", tokenizer.convert_tokens_to_ids(self.processor.image_start_token)
        )
        generation.generation_kwargs = kwargs
        generation._from_model_config = (
            False  # else a reload derives it from the model config, without the kwargs
        )

    def _prompt_ids(self, content: list[dict[str, str]], mode: str) -> list[int]:
        """Token ids of one user message, as `JanusProcessor` makes them for ``mode`` "text" or
        "image".

        Done here because the processor wants the pixels again for every question about a picture.
        """
        processor, bos = self.processor, self._tokenizer.bos_token or ""
        if template := processor.chat_template or self._tokenizer.chat_template:
            chat = [{"role": "user", "content": content}]
            text = processor.apply_chat_template(
                chat, chat_template=template, add_generation_prompt=True
            )
        else:
            text = bos + "".join(part.get("text", processor.image_token) for part in content)
        has_bos = bool(bos) and text.startswith(bos)
        if mode == "image":
            text += processor.image_start_token
        elif processor.use_default_system_prompt:
            text = DEFAULT_SYSTEM_PROMPT + text
        if any(part["type"] == "image" for part in content):
            picture = processor.image_token * processor.num_image_tokens
            framed = processor.image_start_token + picture + processor.image_end_token
            text = text.replace(processor.image_token, framed, 1)
        ids: list[int] = self._tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
        return ids

    def _question_ids(self, question: str) -> tuple[list[int], list[int]]:
        """Prompt ids of picture and question, cut behind the end-of-image token that follows the
        picture.
        """
        ids = self._prompt_ids([{"type": "image"}, {"type": "text", "text": question}], "text")
        image = self.model.config.image_token_id
        if ids.count(image) != self.tokens_per_image:
            raise UserError(f"question {question!r} gives a prompt without exactly one picture")
        cut = ids.index(image) + self.tokens_per_image + 1
        if cut >= len(ids):
            raise UserError(f"question {question!r} must follow the picture in the chat template")
        return ids[:cut], ids[cut:]

    def _answer_ids(self, word: str) -> list[int]:
        spellings = [
            space + form for space in ("", " ") for form in (word, word.capitalize(), word.upper())
        ]
        encoded = [self._tokenizer.encode(text, add_special_tokens=False) for text in spellings]
        found = sorted(
            {ids[0] for ids in encoded if len(ids) == 1} - {self._tokenizer.unk_token_id}
        )
        if not found:
            raise UserError(
                f"the tokenizer has no single token for {word!r}, so the model's verdict cannot be read"
            )
        return found

    def _embed(self, ids: list[int]) -> Tensor:
        return F.embedding(torch.tensor(ids, device=self.model.device), self._backbone.embedding)

    def _vision_features(self, images: np.ndarray) -> Tensor:
        pixels = self.processor.image_processor(images=list(images), return_tensors="pt")[
            "pixel_values"
        ]
        outputs = self._core.get_image_features(
            pixels.to(self.model.device, self.model.dtype), return_dict=True
        )
        features: Tensor = outputs.pooler_output  # [B,N,h]
        return features

    def _read_picture(self, prefix: list[int], features: Tensor) -> Run:
        x = self._embed(prefix).repeat(len(features), 1, 1)
        start = prefix.index(self.model.config.image_token_id)
        x[:, start : start + features.shape[1]] = features
        run = Run(
            self._backbone, torch.zeros(len(x), dtype=torch.long, device=x.device), len(prefix)
        )
        run.extend(x)
        return run


@torch.no_grad()
def token_sampler(model: JanusForConditionalGeneration, backbone: Backbone) -> TokenSampler:
    """The fused loop over a Janus model whose `generation_config` is complete; it draws what
    stock `generate` draws.
    """
    core, generation = model.model, model.generation_config
    every = torch.arange(core.vqmodel.quantize.embedding.num_embeddings, device=model.device)
    head = core.generation_head
    project = fuse(head.proj_out)
    return TokenSampler(
        backbone,
        model.prepare_embeddings_for_image_generation(every),
        lambda hidden: head.activation_fn(project(hidden)),
        fuse(head.vision_head),
        tokens=core.vision_model.config.num_image_tokens,
        pad_id=generation.pad_token_id,
        kept_ids=[generation.bos_token_id, generation.generation_kwargs["boi_token_id"]],
    )


class JanusRenderer(Renderer):
    """`Renderer` over a float32 copy of a Janus VQ decoder; always in evaluation mode."""

    def __init__(self, vqmodel: Any) -> None:
        super().__init__()
        self.post_quant_conv = deepcopy(vqmodel.post_quant_conv).float()
        self.decoder = deepcopy(vqmodel.decoder).float()
        self.side: int = vqmodel.quantize.quant_state_dims[0]
        self.requires_grad_(False).train()

    def train(self, mode: bool = True) -> JanusRenderer:
        """Stay in evaluation mode: the decoder is frozen, its dropout too."""
        super().train(False)
        return self

    def forward(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """Pixels float ``[B,3,H,W]`` of tokens ``[B,N]`` under ``codebook`` ``[K,d]``."""
        return _render(self.post_quant_conv, self.decoder, tokens, codebook, self.side)


def _render(
    post_quant_conv: nn.Module, decoder: nn.Module, tokens: Tensor, codebook: Tensor, side: int
) -> Tensor:
    """What `JanusVQVAE.decode` computes, with the codebook as an argument (rows are normalised,
    as there).
    """
    rows = F.normalize(F.embedding(tokens.long(), codebook), p=2, dim=-1)
    latents = rows.view(len(tokens), side, side, -1).permute(0, 3, 1, 2)  # channels last already
    pixels: Tensor = decoder(post_quant_conv(latents))
    return pixels
