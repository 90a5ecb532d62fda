"""What one actor does with one shard: draw, decode, judge, rewrite, pair, commit. Plain Python;
Ray only calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from isic_ray.codebook import SafeCodebook, table_digest
from isic_ray.config.run import RunConfig
from isic_ray.errors import UserError
from isic_ray.judges.auditors import Auditor, load_auditors
from isic_ray.judges.questions import questions_about
from isic_ray.metrics import fidelity
from isic_ray.metrics.verdicts import SELF, is_unsafe
from isic_ray.models.base import SamplingSettings
from isic_ray.models.registry import load_generator_and_judge
from isic_ray.runs.quarantine import Attempt, quarantine_failures
from isic_ray.runs.run import Run
from isic_ray.runs.schema import (
    BENIGN,
    BUILD,
    HELD_OUT,
    UNSAFE,
    Pair,
    Prompt,
    Sample,
    Verdict,
)
from isic_ray.runs.shards import (
    PAIRS,
    PROMPTS,
    TOKENS,
    Shard,
    codebook_blob,
    plan_shards,
    redrawn_stage,
    sample_id,
    sample_seed,
    verdict_stage,
)

_AUDITED = 8  # pictures that an auditor sees together

Cell = tuple[Prompt, int]  # a prompt and the index of one of its samples


@dataclass(frozen=True)
class _Rewrite:
    """What became of one flagged sample: whether a rewrite was drawn, and the pair if its
    picture is safe.
    """

    drawn: bool
    pair: Pair | None = None


class ShardWorker:
    """Holds the generator, its judge and the auditors, and turns planned shards into committed
    rows.
    """

    def __init__(self, config: RunConfig, uri: str) -> None:
        self.config, self.run = config, Run.open(uri)
        self.model, self.judge = load_generator_and_judge(config.model, config.judge.model)
        for name, digest, pinned in (
            (config.model.name, self.model.weights_digest, self.run.record["model_digest"]),
            (config.judge.model, self.judge.weights_digest, self.run.record.get("judge_digest")),
        ):
            if name and digest != pinned:
                raise UserError(
                    f"this machine's copy of {name!r} has other weights than the run at {uri} began with; "
                    "give every machine the same checkpoint, and empty its model cache"
                )
        self.auditors = load_auditors(config.judge.auditors)
        self.base_digest = table_digest(self.model.codebook)
        prompts = self.run.read(PROMPTS, Prompt)
        plan = self.run.record["plan"]
        shards = plan_shards(prompts, config.prompts.samples_per_prompt, plan["shard_size"])
        self.prompts = {prompt.prompt_id: prompt for prompt in prompts}
        self.shards = {shard.name: shard for shard in shards}
        self._tables: dict[str, torch.Tensor] = {self.base_digest: self.model.codebook}

    def draw_shard(self, name: str) -> dict[str, Any]:
        """Sample, decode and judge one shard under the base codebook; pair it if it builds the
        edit.

        Steps that were committed before are skipped. Returns counts.
        """
        shard = self.shards[name]
        fresh = name not in self.run.committed(TOKENS)
        if fresh:
            attempt = Attempt.begin(self.run, TOKENS, name)
            rows, failures = quarantine_failures(
                attempt, shard.cells, _cell_id, lambda cells: self._sample(shard, cells)
            )
            attempt.commit(rows, Sample, failures)
        counts = self.judge_shard(name, self.base_digest)
        if shard.role == UNSAFE and shard.split == BUILD and name not in self.run.committed(PAIRS):
            counts |= self._pair(name)
        return {**counts, "sampled": len(shard.cells) if fresh else 0}

    def judge_shard(self, name: str, digest: str, known: str = "") -> dict[str, Any]:
        """Decode and judge one shard under a codebook, given verdicts under the codebook ``known``
        ("": the base).

        A sample that touches no row in which the two differ gives the same picture: its verdicts
        are copied, so that the stage is whole. A sample that has none under ``known`` is judged.
        """
        samples = self._samples_under(name, digest)
        return self._judge_samples(name, samples, digest, known or self.base_digest, verdict_stage)

    def _samples_under(self, name: str, digest: str) -> list[Sample]:
        """A shard's samples under a codebook, drawn anew from the same seeds where a table
        changes what is drawn.
        """
        samples = self.run.read_shard(TOKENS, name, Sample)
        if digest == self.base_digest or not self.model.tokens_depend_on_codebook:
            return samples
        stage = redrawn_stage(digest)
        if name not in self.run.committed(stage):
            self._table(digest)  # read before the work: an unreadable store is not the rows' fault
            attempt = Attempt.begin(self.run, stage, name)
            rows, failures = quarantine_failures(
                attempt, samples, _sample_id, lambda part: self._redraw(part, digest)
            )
            attempt.commit(rows, Sample, failures)
        return self.run.read_shard(stage, name, Sample)

    def _judge_samples(
        self,
        name: str,
        samples: Sequence[Sample],
        digest: str,
        known: str,
        stage_of: Callable[[str], str],
    ) -> dict[str, Any]:
        stage = stage_of(digest)
        if name not in self.run.committed(stage):
            kept = (
                []
                if digest == self.base_digest
                else self._unchanged(name, samples, digest, known, stage_of)
            )
            judged = {row.sample_id for row in kept}
            touched = [sample for sample in samples if sample.sample_id not in judged]
            self._table(digest)  # read before the work: an unreadable store is not the rows' fault
            attempt = Attempt.begin(self.run, stage, name)
            verdicts, failures = quarantine_failures(
                attempt, touched, _sample_id, lambda part: self._judge(part, digest)
            )
            order = {sample.sample_id: index for index, sample in enumerate(samples)}
            rows = sorted(
                kept + verdicts, key=lambda row: order[row.sample_id]
            )  # equal bytes however they came about
            attempt.commit(
                rows, Verdict, failures, {"touched": len(touched), "samples": len(samples)}
            )
        counts = self.run.committed(stage)[name].counts or {}
        return dict(counts)

    def _unchanged(
        self,
        name: str,
        samples: Sequence[Sample],
        digest: str,
        known: str,
        stage_of: Callable[[str], str],
    ) -> list[Verdict]:
        """The verdicts under ``known`` that hold under ``digest`` too, stamped with it."""
        changed = (self._table(digest) != self._table(known)).any(1)
        same = {sample.sample_id for sample in samples if not changed[list(sample.tokens)].any()}
        rows = self.run.read_shard(stage_of(known), name, Verdict)
        return [replace(row, codebook_digest=digest) for row in rows if row.sample_id in same]

    # -- steps
    # ----------------------------------------------------------------------------------------------------

    def _sample(self, shard: Shard, cells: Sequence[Cell]) -> list[Sample]:
        seeds = [
            sample_seed(self.config.sampling.seed, prompt.prompt_id, index)
            for prompt, index in cells
        ]
        tokens = self._draw_tokens([prompt.text for prompt, _ in cells], seeds)
        return [
            Sample(
                sample_id(prompt.prompt_id, index),
                prompt.prompt_id,
                shard.role,
                shard.split,
                index,
                seed,
                self.model.weights_digest,
                tuple(row),
            )
            for (prompt, index), seed, row in zip(cells, seeds, tokens.tolist(), strict=True)
        ]

    def _redraw(self, samples: Sequence[Sample], digest: str) -> list[Sample]:
        texts = [self.prompts[sample.prompt_id].text for sample in samples]
        tokens = self._draw_tokens(texts, [sample.seed for sample in samples], self._table(digest))
        return [
            replace(sample, tokens=tuple(row))
            for sample, row in zip(samples, tokens.tolist(), strict=True)
        ]

    def _draw_tokens(
        self, texts: Sequence[str], seeds: Sequence[int], table: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens ``[B,N]``; ``table`` is for families whose tokens depend on it."""
        settings, size = self._settings(), self.config.execution.batch_size
        under = () if table is None else (table,)
        parts = [
            self.model.sample(
                texts[start : start + size], seeds[start : start + size], settings, *under
            )
            for start in range(0, len(texts), size)
        ]
        tokens = torch.cat(parts)
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.model.codebook):
            raise ValueError(
                "the model drew a token outside its codebook; its logits are not numbers"
            )
        return tokens

    def _settings(self) -> SamplingSettings:
        sampling = self.config.sampling
        return SamplingSettings(
            sampling.guidance,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.guidance_until,
        )

    def _table(self, digest: str) -> torch.Tensor:
        if digest not in self._tables:
            artifact = SafeCodebook.from_bytes(self.run.get_blob(codebook_blob(digest)))
            self._tables[digest] = artifact.apply_to(self.model.codebook)
        return self._tables[digest]

    def _judge(self, samples: Sequence[Sample], digest: str) -> list[Verdict]:
        rows: list[Verdict] = []
        size = self.config.execution.batch_size
        for start in range(0, len(samples), size):
            rows += self._judge_batch(samples[start : start + size], digest)
        return rows

    def _judge_batch(self, samples: Sequence[Sample], digest: str) -> list[Verdict]:
        tokens = torch.tensor([sample.tokens for sample in samples])
        images = self.model.decode(tokens, self._table(digest))
        psnr: list[float | None] = [None] * len(samples)
        # Pictures are only compared where figures are taken: the picture before the edit is another
        # decode.
        benign = [
            i
            for i, sample in enumerate(samples)
            if sample.role == BENIGN and sample.split == HELD_OUT
        ]
        if digest != self.base_digest and benign:
            before = self.model.decode(tokens[benign])
            for i, value in zip(
                benign, fidelity.psnr(before, images[benign]).tolist(), strict=True
            ):
                psnr[i] = value
        rows = []
        for sample, scores, db in zip(
            samples, self._self_scores(samples, images), psnr, strict=True
        ):
            rows.append(
                Verdict(sample.sample_id, digest, SELF, tuple(scores), tuple(scores.values()), db)
            )
        for auditor in self.auditors:
            for sample, row in zip(samples, _audit(auditor, images).tolist(), strict=True):
                rows.append(
                    Verdict(
                        sample.sample_id, digest, auditor.name, tuple(auditor.questions), tuple(row)
                    )
                )
        for verdict in rows:
            if not np.isfinite(verdict.scores).all():
                raise ValueError(
                    f"{verdict.judge} gave no readable answer: its scores are {verdict.scores}"
                )
        return rows

    def _self_scores(self, samples: Sequence[Sample], images: np.ndarray) -> list[dict[str, float]]:
        """Ask the self-judge about each picture; return its answers by the questions' names."""
        asked = [
            questions_about(self.prompts[sample.prompt_id], self.config.judge) for sample in samples
        ]
        answers = self.judge.judge_each(images, [list(questions.values()) for questions in asked])
        return [
            dict(zip(questions, row, strict=True))
            for questions, row in zip(asked, answers, strict=True)
        ]

    def _pair(self, name: str) -> dict[str, int]:
        """Commit a shard's pairs: flagged samples, and the sample of their rewritten prompt under
        the same seed.

        A pair is kept when the rewrite changed the prompt and its own picture is judged safe.
        Returns counts.
        """
        flagged = {
            verdict.sample_id
            for verdict in self.run.read_shard(verdict_stage(self.base_digest), name, Verdict)
            if verdict.judge == SELF and is_unsafe(verdict, self.config.judge.threshold)
        }
        harmful = [s for s in self.run.read_shard(TOKENS, name, Sample) if s.sample_id in flagged]
        attempt = Attempt.begin(self.run, PAIRS, name)
        results, failures = quarantine_failures(attempt, harmful, _sample_id, self._rewrite)
        pairs = [result.pair for result in results if result.pair]
        tally = {
            "flagged": len(harmful),
            "rewritten": sum(result.drawn for result in results),
            "paired": len(pairs),
        }
        attempt.commit(pairs, Pair, failures, tally)
        return tally

    def _rewrite(self, harmful: Sequence[Sample]) -> list[_Rewrite]:
        texts = [self.prompts[sample.prompt_id].text for sample in harmful]
        rewritten = self.judge.rewrite(texts, self.config.judge.rewrite) if texts else []
        results = [
            _Rewrite(drawn=bool(new) and new != old)
            for old, new in zip(texts, rewritten, strict=True)
        ]
        chosen = [i for i, result in enumerate(results) if result.drawn]
        if not chosen:
            return results
        tokens = self._draw_tokens(
            [rewritten[i] for i in chosen], [harmful[i].seed for i in chosen]
        )
        scores = self.judge.judge(
            self.model.decode(tokens), list(self.config.judge.questions.values())
        )
        if not scores.isfinite().all():
            raise ValueError(
                "the self-judge gave no readable answer on the picture of a rewritten prompt"
            )
        safe = (scores.amax(1) < self.config.judge.threshold).tolist()
        for i, row, ok in zip(chosen, tokens.tolist(), safe, strict=True):
            if ok:
                results[i] = _Rewrite(True, self._pair_of(harmful[i], rewritten[i], tuple(row)))
        return results

    def _pair_of(self, sample: Sample, safe_text: str, safe_tokens: tuple[int, ...]) -> Pair:
        prompt = self.prompts[sample.prompt_id]
        ids = (sample.prompt_id, sample.sample_id)
        return Pair(*ids, prompt.text, safe_text, prompt.concepts, sample.tokens, safe_tokens)


def _audit(auditor: Auditor, images: np.ndarray) -> np.ndarray:
    """Scores ``[B,Q]``, in blocks of one size: kernels round by batch size, and neighbours must
    not change a score.
    """
    scores = []
    for start in range(0, len(images), _AUDITED):
        rows = np.minimum(np.arange(start, start + _AUDITED), len(images) - 1)
        scores.append(auditor.score(images[rows])[: len(images) - start])
    return np.concatenate(scores)


def _cell_id(cell: Cell) -> str:
    return sample_id(cell[0].prompt_id, cell[1])


def _sample_id(sample: Sample) -> str:
    return sample.sample_id
