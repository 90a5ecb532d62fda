"""Train the language model's three skills: draw, judge, rewrite.

Shapes: B pictures, N = 36 visual tokens per picture, T tokens of a text, Q questions per picture, P
positions of a picture that is looked at, S = P + T, h the model's width, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isic_ray.pictogram.draw import draw
from isic_ray.pictogram.scene import (
    CONCEPTS,
    HELD_OUT_NOUNS,
    KINDS,
    NOUNS,
    Scene,
    caption,
    safe_wording,
    sample_wording,
)
from isic_ray.pictogram.training.model import BOI, BOS, EOI, EOS, PAD
from isic_ray.pictogram.training.picture_tokens import Pool
from isic_ray.pictogram.training.stages import Stage, jitter, to_pixels, training_scene

# Kinds that look alike: the judge is asked about the other one more often than about a random kind.
_LOOKALIKES = {
    "knife": "spoon",
    "spoon": "knife",
    "gun": "hammer",
    "hammer": "gun",
    "bomb": "ball",
    "ball": "bomb",
    "blood": "heart",
    "heart": "blood",
    "skull": "cup",
    "cup": "skull",
}
_UNGUIDED = 0.1  # share of captions that are blanked: guidance needs an unconditional prompt
_DECODED = 0.7  # share of judged pictures that went through the tokenizer; the others are drawings

Question = tuple[str, bool]  # a text, and whether the answer is yes


@dataclass(frozen=True)
class _Packed:
    """The questions about each picture, one after another in one row of tokens."""

    tokens: Tensor  # [B,T] int64
    positions: Tensor  # [B,S] int64
    mask: Tensor  # [B,1,S,S] float32: 0 where a position sees another one, else the lowest number
    last: Tensor  # [B,Q] int64, where each question ends
    answers: Tensor  # [B,Q] int64, the tokens of "yes" and "no"


class SkillStage(Stage):
    """One language model learns to draw from captions, to answer questions and to rewrite prompts.

    The questions are about pictures, and are answered by yes or no.
    """

    name = "skills"
    learning_rate = 1.2e-3

    def __init__(self, model: Any, processor: Any, pool: Pool, *, steps: int = 16_000) -> None:
        self.steps, self.batch_size = steps, 1
        self.model, self.tokenizer, self.pool = model, processor.tokenizer, pool
        self.ids = {
            name: self.tokenizer.convert_tokens_to_ids(name)
            for name in (PAD, BOS, EOS, BOI, EOI, "yes", "no")
        }
        # It teaches the vision tower faster than the answers alone, and is no part of the model.
        self.kind_probe = nn.Linear(model.config.vision_config.hidden_size, len(KINDS))
        for parameter in model.model.vqmodel.parameters():
            parameter.requires_grad_(False)
        self.module = nn.ModuleDict({"model": model, "kind_probe": self.kind_probe})
        self._figures: dict[str, float] = {}

    def loss(self, step: int, rng: Random) -> Tensor:
        draw_loss = self._draw_loss(rng, 28)
        judge_loss, probe_loss, accuracy = self._judge_loss(rng, 3)
        rewrite_loss = self._rewrite_loss(rng, 2)
        self._figures = {
            "draw": draw_loss.item(),
            "judge": judge_loss.item(),
            "probe": probe_loss.item(),
            "rewrite": rewrite_loss.item(),
            "judge_accuracy": accuracy,
        }
        return draw_loss + judge_loss + probe_loss + 0.5 * rewrite_loss

    def report(self) -> dict[str, float]:
        return self._figures

    # Drawing

    def _draw_loss(self, rng: Random, size: int) -> Tensor:
        picks = [rng.randrange(len(self.pool.scenes)) for _ in range(size)]
        rows = []
        for pick in picks:
            scene = self.pool.scenes[pick]
            words = self._words(caption(scene, sample_wording(rng, scene, held_out=None)))
            if rng.random() < _UNGUIDED:
                # Janus's unconditional prompt is pads that stay attended.
                words = [self.ids[PAD]] * len(words)
            rows.append([self.ids[BOS], *words, self.ids[BOI]])
        text, mask = _left_pad(rows, self.ids[PAD])
        tokens = self.pool.tokens[picks]  # [B,N]
        inner = self.model.model
        images = inner.generation_aligner(inner.generation_embeddings(tokens[:, :-1]))
        embeds = torch.cat([self.model.get_input_embeddings()(text), images], 1)
        mask = torch.cat([mask, torch.ones_like(tokens[:, :-1])], 1)
        hidden = self._language(embeds, mask)[:, text.shape[1] - 1 :]  # [B,N,h]
        logits = inner.generation_head(hidden)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def _language(self, embeds: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        outputs = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        )
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    def _words(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # Judging

    def _judge_loss(self, rng: Random, size: int) -> tuple[Tensor, Tensor, float]:
        """Return the losses of the answers and of the probe, and the share of right answers.

        The questions about a picture share its features; each sees the picture and itself, not the
        others.
        """
        picks = [rng.randrange(len(self.pool.decoded)) for _ in range(size)]
        images = np.stack([self._picture(pick, rng) for pick in picks])
        scenes = [self.pool.scenes[pick] for pick in picks]
        features = self.model.model.vision_model(jitter(to_pixels(images), rng)).last_hidden_state
        wanted = torch.tensor([[float(kind in scene.kinds) for kind in KINDS] for scene in scenes])
        probed = self.kind_probe(features.amax(1))
        probe_loss = F.binary_cross_entropy_with_logits(probed, wanted) * 3
        prefix = self._picture_prefix(self.model.model.aligner(features))  # [B,P,h]
        packed = self._pack([_questions(scene, rng) for scene in scenes], prefix.shape[1])
        embeds = torch.cat([prefix, self.model.get_input_embeddings()(packed.tokens)], 1)
        outputs = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=packed.mask,
            position_ids=packed.positions,
            use_cache=False,
        )
        rows = torch.arange(size)[:, None]
        logits = self.model.lm_head(outputs.last_hidden_state[rows, packed.last])  # [B,Q,V]
        guess = logits[..., self.ids["yes"]] > logits[..., self.ids["no"]]
        accuracy = (guess == (packed.answers == self.ids["yes"])).float().mean().item()
        loss = F.cross_entropy(logits.flatten(0, 1), packed.answers.flatten())
        return loss, probe_loss, accuracy

    def _picture(self, pick: int, rng: Random) -> np.ndarray:
        if rng.random() < _DECODED:
            return np.asarray(self.pool.decoded[pick])
        return np.asarray(draw(self.pool.scenes[pick], rng))

    def _picture_prefix(self, features: Tensor) -> Tensor:
        """Put `<s> <boi>` before and `<eoi>` after the features of pictures ``[B,P-3,h]``."""
        embed = self.model.get_input_embeddings()
        edge = embed(torch.tensor([[self.ids[BOS], self.ids[BOI], self.ids[EOI]]]))
        edge = edge.expand(len(features), -1, -1)
        return torch.cat([edge[:, :2], features, edge[:, 2:]], 1)

    def _pack(self, asked: list[list[Question]], prefix: int) -> _Packed:
        """Lay the questions about each picture one after another, behind ``prefix`` positions.

        A mask keeps the questions apart, and each counts its positions from the picture's end.
        """
        token_rows, spans, answers = [], [], []
        for questions in asked:
            row: list[int] = []
            row_spans = []
            for text, _ in questions:
                words = self._words(text)
                row_spans.append((len(row), len(row) + len(words)))
                row += words
            token_rows.append(row)
            spans.append(row_spans)
            answers.append([self.ids["yes" if yes else "no"] for _, yes in questions])
        width = max(len(row) for row in token_rows)
        padded = [row + [self.ids[PAD]] * (width - len(row)) for row in token_rows]
        positions = torch.arange(prefix + width).repeat(len(asked), 1)
        allowed = torch.zeros(len(asked), prefix + width, prefix + width, dtype=torch.bool)
        allowed[:, :, 0] = True  # padding must see something
        allowed[:, :prefix, :prefix] = torch.ones(prefix, prefix, dtype=torch.bool).tril()
        for i, row_spans in enumerate(spans):
            for start, end in row_spans:
                lo, hi = prefix + start, prefix + end
                allowed[i, lo:hi, :prefix] = True
                allowed[i, lo:hi, lo:hi] = torch.ones(hi - lo, hi - lo, dtype=torch.bool).tril()
                positions[i, lo:hi] = torch.arange(prefix, prefix + hi - lo)
        lowest = torch.finfo(torch.float32).min
        return _Packed(
            tokens=torch.tensor(padded),
            positions=positions,
            mask=torch.zeros(allowed.shape).masked_fill(~allowed, lowest)[:, None],
            last=torch.tensor([[prefix + end - 1 for _, end in row] for row in spans]),
            answers=torch.tensor(answers),
        )

    # Rewriting

    def _rewrite_loss(self, rng: Random, size: int) -> Tensor:
        rows, targets = [], []
        for _ in range(size):
            scene = training_scene(rng)
            wording = sample_wording(rng, scene, held_out=None)
            head = self._words(f"rewrite safely : {caption(scene, wording)} :")
            tail = self._words(caption(scene.safe(), safe_wording(scene, wording)))
            rows.append([self.ids[BOS], *head, *tail, self.ids[EOS]])
            targets.append(len(tail) + 1)
        text, mask = _left_pad(rows, self.ids[PAD])
        hidden = self._language(self.model.get_input_embeddings()(text), mask)
        logits = self.model.lm_head(hidden[:, :-1])
        labels = text[:, 1:].clone()
        for i, length in enumerate(targets):
            labels[i, :-length] = -100
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def _questions(scene: Scene, rng: Random) -> list[Question]:
    """Return six questions: both concepts, two about what is shown, two about what is not.

    A look-alike of what is shown comes first among what is not.
    """
    asked = [(f"does this picture show {_article(c)} ?", c in scene.concepts) for c in CONCEPTS]
    shown = sorted(scene.kinds)
    absent = [kind for kind in KINDS if kind not in scene.kinds]
    near = [_LOOKALIKES[kind] for kind in shown if _LOOKALIKES.get(kind) in absent]
    negatives = [*near[:1], *rng.sample(absent, 3)][:2]
    about = [(rng.choice(shown), True), (shown[-1], True), *((kind, False) for kind in negatives)]
    for kind, yes in about:
        words = (kind, *NOUNS.get(kind, ()), *HELD_OUT_NOUNS.get(kind, ()))
        word = kind if rng.random() < 0.7 else rng.choice(words)
        article = "an" if word[0] in "aeiou" else "a"
        asked.append((f"is there {article} {word} in the picture ?", yes))
    return asked


def _article(concept: str) -> str:
    return "a weapon" if concept == "weapon" else concept


def _left_pad(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return token rows as ``[B,T]`` with padding on the left, and the mask of real tokens."""
    width = max(len(row) for row in rows)
    text = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return text, mask
