"""Share what Emu3, Chameleon and Anole have in common: picture tokens are words of the vocabulary.

They read pictures through the codebook as they draw them. Here reading always uses the base table,
so an edit changes what is drawn and never what the judge sees.

Shapes: B pictures of h by w tokens, K codebook rows, L words of a prompt, R rows in flight, V words
of the vocabulary; a network's hidden size is also h where it stands alone.
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
from isic_ray.models.decoding.asking import answer_ids, ask
from isic_ray.models.decoding.network import Network
from isic_ray.models.decoding.picture_sampler import PictureSampler, one_token
from isic_ray.models.decoding.text import answer_in_text
from isic_ray.models.families.adapter import VisualAdapter, check_prompt_lengths, picture_blocks


class VocabularyModel(VisualAdapter):
    """`UnifiedModel` over a transformers model (``.model``) and its ``.processor``.

    A family's adapter subclasses it and provides, beside what `VisualAdapter` asks for except
    `sample`, `judge` and `rewrite`,

    - the attributes below, then a call of `prepare_sampling`;
    - `drawing_ids`, `free_ids`, `text_ids` and `frame`;
    - `answer_logits`, where the language model's head is not all of it.
    """

    processor: Any
    network: Network
    words: Tensor  # [K] int64: the vocabulary id of each codebook row
    image_token: str  # stands for one picture in a text
    room: int  # positions that the language model was trained for
    sampler: PictureSampler  # see `prepare_sampling`

    def prepare_sampling(self, height: int, width: int, separator: int | None = None) -> None:
        """Set up drawing of ``height`` by ``width`` tokens.

        ``separator`` is the word that ends every row of them.
        """
        self.tokens_per_image = height * width
        head = _rows(self.model.lm_head.weight, self.words)  # [K,h]
        self.sampler = PictureSampler(
            self.network,
            one_token(
                _rows(self.network.embedding, self.words), lambda hidden: F.linear(hidden, head)
            ),
            positions=height * width,
            row=0 if separator is None else width,
            separator=None if separator is None else self.embed([separator])[0],
        )

    def drawing_ids(self, prompt: str) -> list[int]:
        """Return the ids of a prompt up to where the first picture token is drawn."""
        raise NotImplementedError

    def free_ids(self) -> list[int]:
        """Return the ids that classifier-free guidance contrasts with every prompt's."""
        raise NotImplementedError

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text to answer; with ``image_token`` in it, of a picture too."""
        raise NotImplementedError

    def frame(self, height: int, width: int) -> str:
        """Return the text that stands for one picture of that many tokens.

        It holds ``image_token`` once per id that `spread` gives.
        """
        raise NotImplementedError

    def spread(self, codes: Tensor) -> Tensor:
        """Return vocabulary ids ``[B,L]`` of codes ``[B,h,w]``, as they lie in a prompt."""
        return self.words.to(codes.device)[codes].flatten(1)

    def answer_logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``[R,V]`` of the next word of a text."""
        logits: Tensor = self.model.lm_head(hidden)
        return logits

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
    ) -> Tensor:
        """Return visual tokens int32 ``[B,N]`` on CPU; see `UnifiedModel.sample`."""
        given = [self.drawing_ids(prompt) for prompt in prompts]
        check_prompt_lengths(prompts, given, self.room - self.tokens_per_image)
        free = self.embed(self.free_ids())
        return self.sampler.draw(
            [self.embed(ids) for ids in given], [free] * len(given), list(seeds), settings
        )

    @torch.no_grad()
    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        """Return P(yes) float32 ``[B,Q]``, over all one-token spellings of yes and no.

        Pictures ``[B,H,W,3]`` may have any one size. Raises UserError when the tokenizer has no
        one-token yes or no.
        """
        tokenizer = self.processor.tokenizer
        answers = answer_ids(tokenizer, "yes"), answer_ids(tokenizer, "no")
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
        """Return the greedy answer to each ``instruction.format(prompt=...)``, stripped."""
        tokenizer, eos = self.processor.tokenizer, self.model.generation_config.eos_token_id
        return answer_in_text(
            self.network,
            self.answer_logits,
            tokenizer,
            [self.text_ids(instruction.format(prompt=prompt)) for prompt in prompts],
            pad_id=0,  # any word: nothing attends to padding
            eos=tokenizer.eos_token_id if eos is None else eos,
        )

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return the embeddings ``[L,h]`` of words."""
        table = self.network.embedding
        return F.embedding(torch.tensor(ids, dtype=torch.long, device=table.device), table)

    @property
    def _placeholder(self) -> int:
        found: int = self.processor.tokenizer.convert_tokens_to_ids(self.image_token)
        return found

    def _by_opening(
        self, questions: Sequence[str], codes: Tensor, length: int
    ) -> dict[tuple[int, ...], list[tuple[int, list[int]]]]:
        """Return the questions by their prompt up to the end of the picture.

        ``{opening: [(index of the question, ending)]}``; the opening holds ``length`` placeholders
        for the picture's codes ``[B,h,w]``.
        """
        found: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        frame = self.frame(codes.shape[1], codes.shape[2])
        framed = self.processor.tokenizer(frame, add_special_tokens=False)["input_ids"]
        if framed.count(self._placeholder) != length:
            raise UserError(
                f"the processor frames {framed.count(self._placeholder)} tokens, not {length}"
            )
        for index, question in enumerate(questions):
            ids = self.text_ids(f"{self.image_token}{question}")
            marks = [at for at, word in enumerate(ids) if word == self._placeholder]
            if len(marks) != 1:
                raise UserError(f"question {question!r} gives a prompt without exactly one picture")
            opening = (*ids[: marks[0]], *framed)
            found.setdefault(opening, []).append((index, ids[marks[0] + 1 :]))
        return found


def _rows(weight: Tensor, ids: Tensor) -> Tensor:
    """Return ``weight[ids]``, as a view where the ids follow one another: a vocabulary is large."""
    first, count = int(ids[0]), len(ids)
    if torch.equal(ids.cpu(), torch.arange(first, first + count)):
        return weight[first : first + count]
    return weight[ids.to(weight.device)]
