"""Families whose picture tokens are words of the language model's vocabulary: Emu3, Chameleon,
Anole.

They read pictures through the codebook as they draw them. Here reading always uses the base table,
so an edit changes what is drawn and never what the judge sees. Shapes: B pictures of h by w tokens,
K rows of the codebook, L words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from isic_ray.errors import UserError
from isic_ray.models.base import SamplingSettings
from isic_ray.models.decoding.picture_sampler import (
    Network,
    PictureSampler,
    answer_ids,
    ask,
    one_token,
    rows_of,
)
from isic_ray.models.decoding.sampler import complete_greedily
from isic_ray.models.families.adapter import VisualAdapter, picture_blocks

_REWRITE_LIMIT = 96  # tokens of a rewritten prompt at the most


class VocabularyModel(VisualAdapter):
    """`UnifiedModel` over a transformers model (``.model``) and its ``.processor``."""

    processor: Any
    network: Network
    words: Tensor  # [K] int64: the vocabulary id of each codebook row
    image_token: str  # stands for one picture in a text
    room: int  # positions that the language model was trained for

    def prepare_sampling(self, height: int, width: int, separator: int | None = None) -> None:
        """Set up drawing of ``height`` by ``width`` tokens; ``separator`` is the word that ends
        every row of them.
        """
        self.tokens_per_image = height * width
        self.sampler = PictureSampler(
            self.network,
            one_token(rows_of(self.network.embedding, self.words), self._picture_head()),
            positions=height * width,
            row=0 if separator is None else width,
            separator=None if separator is None else self.embed([separator])[0],
        )

    # -- what a family must say
    # -----------------------------------------------------------------------------------

    def drawing_ids(self, prompt: str) -> list[int]:
        """The prompt up to where the first picture token is drawn."""
        raise NotImplementedError

    def free_ids(self) -> list[int]:
        """The same without the prompt, for classifier-free guidance."""
        raise NotImplementedError

    def text_ids(self, text: str) -> list[int]:
        """A text that the model shall answer; with ``image_token`` in it, a picture."""
        raise NotImplementedError

    def frame(self, height: int, width: int) -> str:
        """The text that stands for one picture: `spread` gives its placeholders' ids."""
        raise NotImplementedError

    def spread(self, codes: Tensor) -> Tensor:
        """Vocabulary ids ``[B,L]`` of a block of pictures' codes ``[B,h,w]``, as they lie in a
        prompt.
        """
        return self.words.to(codes.device)[codes].flatten(1)

    def answer_logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[R,V]`` of the next word of a text."""
        logits: Tensor = self.model.lm_head(hidden)
        return logits

    # -- what follows from it
    # ---------------------------------------------------------------------------------------

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
    ) -> Tensor:
        """Visual tokens int32 ``[B,N]`` on CPU; see `UnifiedModel.sample`. Raises UserError for
        a prompt too long.
        """
        given = [self.drawing_ids(prompt) for prompt in prompts]
        longest = self.room - self.tokens_per_image
        for prompt, ids in zip(prompts, given, strict=True):
            if len(ids) > longest:
                raise UserError(
                    f"prompt {prompt[:60]!r}… has {len(ids)} tokens; the model has room for {longest}"
                )
        free = self.embed(self.free_ids())
        return self.sampler.draw(
            [self.embed(ids) for ids in given], [free] * len(given), list(seeds), settings
        )

    @torch.no_grad()
    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        """P(yes) float32 ``[B,Q]``: the next token's mass on "yes" against "no", over all their
        one-token spellings.

        Pictures ``[B,H,W,3]`` may have any one size. Raises UserError when the tokenizer has no
        one-token yes or no.
        """
        answers = (
            answer_ids(self.processor.tokenizer, "yes"),
            answer_ids(self.processor.tokenizer, "no"),
        )
        result = torch.empty(len(images), len(questions))
        for rows in picture_blocks(len(images)):
            codes = self.read(images[rows])
            words = self.spread(codes)
            for opening, group in self._by_opening(questions, codes, words.shape[1]).items():
                ids = torch.tensor(opening, device=words.device).repeat(len(rows), 1)
                ids[ids == self._placeholder] = words.flatten()
                endings = [self.embed(ending) for _, ending in group]
                read = F.embedding(ids, self.network.embedding)
                scores = ask(self.network, self.answer_logits, read, endings, answers)
                for column, (index, _) in enumerate(group):
                    result[torch.from_numpy(rows), index] = scores[:, column]
        return result

    def rewrite(self, prompts: Sequence[str], instruction: str) -> list[str]:
        """Greedy answers to ``instruction.format(prompt=...)``, stripped of special tokens and
        outer spaces.
        """
        tokenizer, generation = self.processor.tokenizer, self.model.generation_config
        eos = (
            generation.eos_token_id
            if generation.eos_token_id is not None
            else tokenizer.eos_token_id
        )
        answers = complete_greedily(
            self.network,
            self.answer_logits,
            [self.text_ids(instruction.format(prompt=prompt)) for prompt in prompts],
            pad_id=0,  # any word: padding is never attended to
            stop_ids=eos if isinstance(eos, list) else [] if eos is None else [eos],
            limit=_REWRITE_LIMIT,
        )
        return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Embeddings ``[L,h]`` of words."""
        table = self.network.embedding
        return F.embedding(torch.tensor(ids, dtype=torch.long, device=table.device), table)

    @property
    def _placeholder(self) -> int:
        found: int = self.processor.tokenizer.convert_tokens_to_ids(self.image_token)
        return found

    def _picture_head(self) -> Any:
        weight = rows_of(self.model.lm_head.weight, self.words)  # [K,h]
        return lambda hidden: F.linear(hidden, weight)

    def _by_opening(
        self, questions: Sequence[str], codes: Tensor, length: int
    ) -> dict[tuple[int, ...], list[tuple[int, list[int]]]]:
        """Questions, by their prompt up to the end of the picture: ``{opening: [(index,
        ending)]}``.
        """
        found: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        frame = self.frame(codes.shape[1], codes.shape[2])
        for index, question in enumerate(questions):
            ids = self.text_ids(f"{self.image_token}{question}")
            marks = [at for at, word in enumerate(ids) if word == self._placeholder]
            if len(marks) != 1:
                raise UserError(f"question {question!r} gives a prompt without exactly one picture")
            framed = self.processor.tokenizer(frame, add_special_tokens=False)["input_ids"]
            if framed.count(self._placeholder) != length:
                raise UserError(
                    f"the processor frames {framed.count(self._placeholder)} tokens, not {length}"
                )
            opening = (*ids[: marks[0]], *framed)
            found.setdefault(opening, []).append((index, ids[marks[0] + 1 :]))
        return found
