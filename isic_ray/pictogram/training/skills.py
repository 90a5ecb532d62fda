"""The last two stages of the embedded model's training: its three skills (draw, judge, rewrite),
and the auditor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isic_ray.pictogram.auditor import KindClassifier
from isic_ray.pictogram.checkpoint import BOI, BOS, EOI, EOS, PAD
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
from isic_ray.pictogram.training.stages import Stage, to_pixels, training_scene

# Pictures for which the judge is asked about a look-alike more often than about a random kind.
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


@dataclass(frozen=True)
class Pool:
    """Training scenes with their visual tokens ``[P,36]`` and, for the first of them, decoded
    pictures (uint8).
    """

    scenes: list[Scene]
    tokens: Tensor
    decoded: np.ndarray


def build_pool(vqmodel: Any, cache: Path, *, size: int = 40_000, decoded: int = 2_000) -> Pool:
    """Draw and tokenise ``size`` training scenes; tokens and pictures are cached in a
    safetensors file.
    """
    scenes = [training_scene(Random(f"scene/{i}")) for i in range(size)]
    if cache.exists():
        saved = load_file(cache)
        return Pool(scenes, saved["tokens"].long(), saved["decoded"].numpy())
    tokens, pictures = [], []
    for start in range(0, size, 100):
        images = np.stack(
            [np.asarray(draw(scenes[i], Random(f"layout/{i}"))) for i in range(start, start + 100)]
        )
        with torch.inference_mode():
            codes = cosine_encode(vqmodel, to_pixels(images))
            tokens.append(codes)
            if start < decoded:
                rendered = vqmodel.decode(codes).permute(0, 2, 3, 1)
                pictures.append(((rendered + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    table, images_ = torch.cat(tokens), torch.cat(pictures)
    save_file({"tokens": table.to(torch.int32), "decoded": images_}, cache)
    return Pool(scenes, table, images_.numpy())


def cosine_encode(vqmodel: Any, pixels: Tensor) -> Tensor:
    """Tokens ``[B,36]`` of pixels ``[B,3,H,W]``: nearest code by cosine, as the original Janus
    does.
    """
    latents = F.normalize(vqmodel.quant_conv(vqmodel.encoder(pixels)), dim=1).permute(0, 2, 3, 1)
    codes = F.normalize(vqmodel.quantize.embedding.weight, dim=1)
    return (latents @ codes.T).argmax(-1).flatten(1)


class SkillStage(Stage):
    """One language model learns to draw from captions, to answer yes/no about pictures and to
    rewrite prompts.
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
        self.kind_probe = nn.Linear(
            model.config.vision_config.hidden_size, len(KINDS)
        )  # teaches the tower faster
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

    # -- drawing
    # ------------------------------------------------------------------------------------------------

    def _draw_loss(self, rng: Random, size: int) -> Tensor:
        rows, picks = [], [rng.randrange(len(self.pool.scenes)) for _ in range(size)]
        for pick in picks:
            scene = self.pool.scenes[pick]
            words = self._words(caption(scene, sample_wording(rng, scene, held_out=None)))
            if (
                rng.random() < 0.1
            ):  # guidance: Janus's unconditional prompt is pads that stay attended
                words = [self.ids[PAD]] * len(words)
            rows.append([self.ids[BOS], *words, self.ids[BOI]])
        text, mask = _left_pad(rows, self.ids[PAD])
        tokens = self.pool.tokens[picks]  # [B,36]
        inner = self.model.model
        images = inner.generation_aligner(inner.generation_embeddings(tokens[:, :-1]))
        embeds = torch.cat([self.model.get_input_embeddings()(text), images], 1)
        mask = torch.cat([mask, torch.ones_like(tokens[:, :-1])], 1)
        hidden = self._language(embeds, mask)[:, text.shape[1] - 1 :]  # [B,36,h]
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

    # -- judging
    # ------------------------------------------------------------------------------------------------

    def _judge_loss(self, rng: Random, size: int) -> tuple[Tensor, Tensor, float]:
        """Several questions a picture share its features; each sees the picture and itself, not
        the others.
        """
        picks = [rng.randrange(len(self.pool.decoded)) for _ in range(size)]
        images = np.stack(
            [
                self.pool.decoded[pick]
                if rng.random() < 0.7
                else np.asarray(draw(self.pool.scenes[pick], rng))
                for pick in picks
            ]
        )
        scenes = [self.pool.scenes[pick] for pick in picks]
        features = self.model.model.vision_model(_jitter(to_pixels(images), rng)).last_hidden_state
        wanted = torch.tensor([[float(kind in scene.kinds) for kind in KINDS] for scene in scenes])
        probe_loss = (
            F.binary_cross_entropy_with_logits(self.kind_probe(features.amax(1)), wanted) * 3
        )
        prefix = self._picture_prefix(self.model.model.aligner(features))  # [B,67,h]
        asked = [_questions(scene, rng) for scene in scenes]
        texts, positions, mask, last, answers = self._pack(asked, prefix.shape[1])
        embeds = torch.cat([prefix, self.model.get_input_embeddings()(texts)], 1)
        outputs = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        )
        rows = torch.arange(size)[:, None]
        logits = self.model.lm_head(outputs.last_hidden_state[rows, last])  # [B,Q,V]
        guess = logits[..., self.ids["yes"]] > logits[..., self.ids["no"]]
        accuracy = (guess == (answers == self.ids["yes"])).float().mean().item()
        return F.cross_entropy(logits.flatten(0, 1), answers.flatten()), probe_loss, accuracy

    def _picture_prefix(self, features: Tensor) -> Tensor:
        embed = self.model.get_input_embeddings()
        edge = embed(torch.tensor([[self.ids[BOS], self.ids[BOI], self.ids[EOI]]])).expand(
            len(features), -1, -1
        )
        return torch.cat([edge[:, :2], features, edge[:, 2:]], 1)

    def _pack(
        self, asked: list[list[tuple[str, bool]]], prefix: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Questions of each picture laid one after another; a 4-d mask keeps them apart,
        positions restart.
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
        texts = torch.tensor([row + [self.ids[PAD]] * (width - len(row)) for row in token_rows])
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
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[
            :, None
        ]
        last = torch.tensor([[prefix + end - 1 for _, end in row_spans] for row_spans in spans])
        return texts, positions, mask, last, torch.tensor(answers)

    # -- rewriting
    # ----------------------------------------------------------------------------------------------

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
        logits = self.model.lm_head(
            self._language(self.model.get_input_embeddings()(text), mask)[:, :-1]
        )
        labels = text[:, 1:].clone()
        for i, length in enumerate(targets):
            labels[i, :-length] = -100
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def _questions(scene: Scene, rng: Random) -> list[tuple[str, bool]]:
    """Six yes/no questions: both concepts, one thing that is shown, three that are not
    (look-alikes first).
    """
    asked = [(f"does this picture show {_article(c)} ?", c in scene.concepts) for c in CONCEPTS]
    shown = sorted(scene.kinds)
    absent = [kind for kind in KINDS if kind not in scene.kinds]
    near = [_LOOKALIKES[kind] for kind in shown if _LOOKALIKES.get(kind) in absent]
    negatives = [*near[:1], *rng.sample(absent, 3)][:2]
    for kind, yes in [
        (rng.choice(shown), True),
        (shown[-1], True),
        *((kind, False) for kind in negatives),
    ]:
        words = (kind, *NOUNS.get(kind, ()), *HELD_OUT_NOUNS.get(kind, ()))
        word = kind if rng.random() < 0.7 else rng.choice(words)
        asked.append(
            (f"is there {'an' if word[0] in 'aeiou' else 'a'} {word} in the picture ?", yes)
        )
    return asked


def _article(concept: str) -> str:
    return "a weapon" if concept == "weapon" else concept


def _left_pad(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token rows as ``[B,T]`` with padding on the left, and the mask of real tokens."""
    width = max(len(row) for row in rows)
    text = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return text, mask


def _jitter(pixels: Tensor, rng: Random) -> Tensor:
    """Light noise, blur and brightness, so that judges do not depend on crisp edges."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    if rng.random() < 0.3:
        pixels = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = torch.randn(pixels.shape, generator=generator) * (0.12 * rng.random())
    return pixels * (1 + 0.1 * (rng.random() - 0.5)) + 0.1 * (rng.random() - 0.5) + noise


class AuditorStage(Stage):
    """The independent classifier, trained on drawings only."""

    name = "auditor"
    learning_rate = 2e-3

    def __init__(self, *, steps: int = 1500) -> None:
        self.steps, self.batch_size = steps, 32
        self.module = KindClassifier()
        self._figures: dict[str, float] = {}

    def loss(self, step: int, rng: Random) -> Tensor:
        scenes = [training_scene(rng) for _ in range(self.batch_size)]
        images = np.stack([np.asarray(draw(scene, rng)) for scene in scenes])
        wanted = torch.tensor([[float(kind in scene.kinds) for kind in KINDS] for scene in scenes])
        logits = self.module(_jitter(to_pixels(images), rng))
        right = ((logits > 0) == (wanted > 0.5)).all(1).float().mean().item()
        self._figures = {"exact": right}
        return F.binary_cross_entropy_with_logits(logits, wanted) * 5

    def report(self) -> dict[str, float]:
        return self._figures
