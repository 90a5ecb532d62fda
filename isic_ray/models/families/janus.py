"""Janus and Janus-Pro (and the embedded model, a small Janus) through transformers.

Results never depend on how the caller batches: pictures are handled in fixed blocks for the reason
that `isic_ray.models.decoding.sampler` explains. The codebook is an argument of decoding; the
model's own table stays as loaded.

Shapes: B pictures, N tokens each, K codebook rows of width d, L positions of a prompt, h the
language model's hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from isic_ray.codebook import SafeCodebook
from isic_ray.errors import UserError
from isic_ray.models.base import Perceiver, SamplingSettings
from isic_ray.models.checkpoints import (
    digest_files,
    load_processor,
    load_stock,
    read_model_type,
)
from isic_ray.models.decoding.asking import after_questions, answer_ids, yes_share
from isic_ray.models.decoding.backbone import Backbone, KVRun, fuse
from isic_ray.models.decoding.sampler import BLOCK, ROWS, TokenSampler
from isic_ray.models.decoding.text import answer_in_text
from isic_ray.models.families.adapter import (
    Painter,
    VisualAdapter,
    check_prompt_lengths,
    export_stock,
    picture_blocks,
    pixels_of,
)
from isic_ray.models.families.perceive import TowerPerceiver
from isic_ray.models.fetching import resolve_checkpoint


class JanusModel(VisualAdapter):
    """`UnifiedModel` over transformers' Janus (``.model``) and its ``.processor``."""

    family = "janus"
    normalised = True

    def __init__(
        self,
        model: JanusForConditionalGeneration,
        processor: JanusProcessor,
        digest: str,
        codebook: Tensor,
    ) -> None:
        """Take ``model`` in its dtype and on its device, and freeze it.

        ``codebook`` ``[K,d]`` is the float32 master table, ``digest`` that of the weight files.
        Raises UserError when the processor and the model do not belong together.
        """
        self.model = model.eval().requires_grad_(False)
        self.processor, self._tokenizer = processor, processor.tokenizer
        self.weights_digest, self.codebook = digest, codebook
        self._core = core = model.model
        core.vqmodel.to(memory_format=torch.channels_last)  # what convolutions are fastest in
        self.painter = painter = JanusPainter(core.vqmodel)
        levels = len(core.vqmodel.config.channel_multiplier)
        self.height = self.width = painter.side * 2 ** (levels - 1)
        self.tokens_per_image: int = core.vision_model.config.num_image_tokens
        grid = {"the VQ grid": painter.side**2, "the processor": processor.num_image_tokens}
        for what, count in grid.items():
            if count != self.tokens_per_image:
                raise UserError(
                    f"the model draws {self.tokens_per_image} tokens per picture "
                    f"but {what} has {count}"
                )
        self._complete_generation_config()
        self._backbone, self._lm_head = Backbone(core.language_model), fuse(model.lm_head)
        self.sampler = token_sampler(model, self._backbone)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        dtype: str = "float32",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> JanusModel:
        """Load "pictogram", a checkpoint directory, URI or hub name.

        Raises UserError when it is not a sound Janus.
        """
        directory = resolve_checkpoint(name)
        model_type = read_model_type(directory)
        if model_type != "janus":
            raise UserError(
                f"{directory} is not a Janus checkpoint: its model_type is {model_type!r}"
            )
        codebook = cls.read_codebook(directory)
        processor = load_processor(JanusProcessor, directory, trust_remote_code)
        model = load_stock(
            JanusForConditionalGeneration, directory, dtype, device, trust_remote_code
        )
        return cls(model, processor, digest_files(cls.files(directory)), codebook)

    def export(self, artifact: SafeCodebook, directory: Path) -> None:
        """Write a checkpoint for stock transformers, with the edit in its table."""
        export_stock(self.model, self.processor, artifact, directory)

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
    ) -> Tensor:
        """Return visual tokens int32 ``[B,N]`` on CPU; see `UnifiedModel.sample`."""
        given = [self.drawing_ids(prompt) for prompt in prompts]
        room = self.model.config.text_config.max_position_embeddings - self.tokens_per_image
        check_prompt_lengths(prompts, given, room)
        return self.sampler.draw(given, seeds, settings)

    def latents(self, images: np.ndarray) -> Tensor:
        """Return ``[B,h,w,d]`` of one block of pictures.

        The row of greatest cosine is then nearest, as Janus was trained; transformers' own
        quantiser compares with rows that it does not normalise.
        """
        vq = self._core.vqmodel
        pixels = pixels_of(images).to(self.device, self.dtype)
        latents: Tensor = vq.quant_conv(vq.encoder(pixels))
        return latents.permute(0, 2, 3, 1)

    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        """Return P(yes) float32 ``[B,Q]``, over all one-token spellings of yes and no.

        Raises UserError when the tokenizer has no one-token yes or no.
        """
        scores = self.judge_each(images, [questions] * len(images))
        return torch.tensor(scores, dtype=torch.float32).reshape(len(images), len(questions))

    @torch.inference_mode()
    def judge_each(
        self, images: np.ndarray, questions: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Return `judge` of each picture's own questions: a picture is read once for all."""
        yes, no = answer_ids(self._tokenizer, "yes"), answer_ids(self._tokenizer, "no")
        asked = dict.fromkeys(question for own in questions for question in own)
        parts = {question: self._question_ids(question) for question in asked}
        openings = dict.fromkeys(tuple(opening) for opening, _ in parts.values())
        multiple = ROWS if self.sampler.elastic() else BLOCK
        scores = [[0.0] * len(own) for own in questions]
        for rows in picture_blocks(len(images), BLOCK):
            features = self._vision_features(images[rows])
            # every question about a picture of the block: (row, picture, place among its questions)
            places = [
                (row, picture, place)
                for row, picture in enumerate(dict.fromkeys(rows.tolist()))
                for place in range(len(questions[picture]))
            ]
            for opening in openings:
                here = [at for at in places if tuple(parts[questions[at[1]][at[2]]][0]) == opening]
                endings = [(row, parts[questions[i][place]][1]) for row, i, place in here]
                read = self._read_picture(list(opening), features)
                for members, hidden in after_questions(read, endings, multiple):
                    shares = yes_share(self._lm_head(hidden), yes, no).tolist()
                    for member, share in zip(members, shares, strict=False):  # the rest is filler
                        _, picture, place = here[member]
                        scores[picture][place] = share
        return scores

    def rewrite(self, prompts: Sequence[str], instruction: str) -> list[str]:
        """Return the greedy answer to each ``instruction.format(prompt=...)``, stripped."""
        generation = self.model.generation_config
        return answer_in_text(
            self._backbone,
            self._lm_head,
            self._tokenizer,
            [self._text_ids(instruction.format(prompt=prompt)) for prompt in prompts],
            pad_id=generation.pad_token_id,
            eos=generation.eos_token_id,
        )

    def perceiver(self) -> Perceiver:
        """Return a float32 copy of the vision tower, differentiable in the pixels."""
        tower, images = self._core.vision_model, self.processor.image_processor
        side = tower.config.image_size
        return TowerPerceiver(tower, (side, side), list(images.image_mean), list(images.image_std))

    def drawing_ids(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt up to where the first picture token is drawn."""
        return self._ids(self._message(prompt), after=self.processor.image_start_token)

    def _text_ids(self, text: str, picture: bool = False) -> list[int]:
        """Return the token ids of a text to answer, which may follow a picture."""
        processor = self.processor
        message = self._message(text, picture)
        if picture:
            placeholders = processor.image_token * processor.num_image_tokens
            framed = processor.image_start_token + placeholders + processor.image_end_token
            message = message.replace(processor.image_token, framed, 1)
        system = DEFAULT_SYSTEM_PROMPT if processor.use_default_system_prompt else ""
        return self._ids(message, before=system)

    def _message(self, text: str, picture: bool = False) -> str:
        """Return one user message, as `JanusProcessor` writes it.

        Written here because the processor wants the pixels again for every question about a
        picture.
        """
        processor, tokenizer = self.processor, self._tokenizer
        if template := processor.chat_template or tokenizer.chat_template:
            image = [{"type": "image"}] if picture else []
            content = [*image, {"type": "text", "text": text}]
            message: str = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                add_generation_prompt=True,
            )
            return message
        return (tokenizer.bos_token or "") + (processor.image_token if picture else "") + text

    def _ids(self, message: str, before: str = "", after: str = "") -> list[int]:
        """Return token ids; a message that begins with the token for it gets no second one."""
        bos = self._tokenizer.bos_token or ""
        has_bos = bool(bos) and message.startswith(bos)
        text = before + message + after
        ids: list[int] = self._tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
        return ids

    def _question_ids(self, question: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a picture and of the question after it.

        The end-of-image token, which follows the picture, is the last of the first part.
        """
        ids = self._text_ids(question, picture=True)
        image = self.model.config.image_token_id
        if ids.count(image) != self.tokens_per_image:
            raise UserError(f"question {question!r} gives a prompt without exactly one picture")
        cut = ids.index(image) + self.tokens_per_image + 1
        if cut >= len(ids):
            raise UserError(f"question {question!r} must follow the picture in the chat template")
        return ids[:cut], ids[cut:]

    def _vision_features(self, images: np.ndarray) -> Tensor:
        """Return ``[B,N,h]``, what the language model is fed of one block of pictures."""
        inputs = self.processor.image_processor(images=list(images), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        features: Tensor = self._core.get_image_features(pixels, return_dict=True).pooler_output
        return features

    def _read_picture(self, opening: list[int], features: Tensor) -> KVRun:
        """Read token ids ``[L]`` with pictures ``[B,N,h]`` in place of their placeholders."""
        ids = torch.tensor(opening, device=self.model.device)
        x = F.embedding(ids, self._backbone.embedding).repeat(len(features), 1, 1)
        start = opening.index(self.model.config.image_token_id)
        x[:, start : start + features.shape[1]] = features
        pads = torch.zeros(len(x), dtype=torch.long, device=x.device)
        run = self._backbone.start(pads, len(opening))
        run.extend(x)
        return run

    def _complete_generation_config(self) -> None:
        """Set the ids that generation needs; stock `generate` then works too, also once saved.

        Raises UserError when the tokenizer lacks one.
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
        boi = tokenizer.convert_tokens_to_ids(self.processor.image_start_token)
        kwargs.setdefault("boi_token_id", boi)
        generation.generation_kwargs = kwargs
        # else a reload derives it from the model config, without the kwargs
        generation._from_model_config = False


@torch.no_grad()
def token_sampler(model: JanusForConditionalGeneration, backbone: Backbone) -> TokenSampler:
    """Return the fused loop over a Janus model; it draws what stock `generate` draws.

    The model's ``generation_config`` must be complete.
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


class JanusPainter(Painter):
    """What `JanusVQVAE.decode` computes, with the codebook as an argument; rows are normalised."""

    def __init__(self, vqmodel: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vqmodel.post_quant_conv, vqmodel.decoder
        self.side: int = vqmodel.quantize.quant_state_dims[0]
        self.requires_grad_(False).train()

    def forward(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """Return pixels float ``[B,3,H,W]`` of tokens ``[B,N]`` under ``codebook`` ``[K,d]``."""
        rows = F.normalize(F.embedding(tokens.long(), codebook), p=2, dim=-1)
        # channels last already, as the convolutions are
        latents = rows.view(len(tokens), self.side, self.side, -1).permute(0, 3, 1, 2)
        pixels: Tensor = self.decoder(self.post_quant_conv(latents))
        return pixels
