"""What one worker does with one shard: draw, decode, judge, rewrite, pair, commit. No Ray here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from isic_ray.codebook import table_digest
from isic_ray.config.run import RunConfig
from isic_ray.errors import UserError
from isic_ray.judges.auditors import Auditor, load_auditors
from isic_ray.judges.questions import questions_about
from isic_ray.judges.rewriting import rewrite_prompts
from isic_ray.metrics.fidelity import psnr
from isic_ray.metrics.results import read_table
from isic_ray.metrics.summary import SELF
from isic_ray.metrics.verdicts import is_unsafe
from isic_ray.models.base import SamplingSettings
from isic_ray.models.registry import load_generator_and_judge
from isic_ray.runs.quarantine import Attempt, quarantine_failures
from isic_ray.runs.run import Run
from isic_ray.runs.schema import BENIGN, BUILD, HELD_OUT, UNSAFE, Pair, Prompt, Sample, Verdict
from isic_ray.runs.shards import (
    PAIRS,
    PROMPTS,
    TOKENS,
    Shard,
    plan_shards,
    redrawn_stage,
    sample_id,
    sample_seed,
    verdict_stage,
)
from isic_ray.workflows.units import DrawUnit, JudgeUnit
from isic_ray.workflows.workers import Counts

_AUDITED = 8  # pictures that an auditor sees together

Cell = tuple[Prompt, int]  # a prompt and the index of one of its samples


class ShardWorker:
    """Holds a generator, its judge and the auditors, and turns planned shards into commits."""

    def __init__(self, config: RunConfig, uri: str) -> None:
        """Raises UserError when this machine's weights are not those that the run began with."""
        self.config, self.run_dir = config, Run.open(uri)
        self.model, self.judge = load_generator_and_judge(config.model, config.judge.model)
        record = self.run_dir.record
        self._check_weights(config.model.name, self.model.weights_digest, record["model_digest"])
        if config.judge.model:
            pinned = record.get("judge_digest", "")
            self._check_weights(config.judge.model, self.judge.weights_digest, pinned)
        self.auditors = load_auditors(config.judge.auditors)
        self.base_digest = table_digest(self.model.codebook)
        prompts, size = self.run_dir.read(PROMPTS, Prompt), record["plan"]["shard_size"]
        shards = plan_shards(prompts, config.prompts.samples_per_prompt, size)
        self.prompts = {prompt.prompt_id: prompt for prompt in prompts}
        self.shards = {shard.name: shard for shard in shards}
        self._tables: dict[str, torch.Tensor] = {self.base_digest: self.model.codebook}

    def _check_weights(self, name: str, digest: str, pinned: str) -> None:
        if digest != pinned:
            raise UserError(
                f"this machine's copy of {name!r} has other weights than the run at "
                f"{self.run_dir.store.uri} began with; give every machine the same checkpoint, and "
                "empty its model cache"
            )

    def run(self, unit: DrawUnit | JudgeUnit) -> Counts:
        """Run one unit and return its counts; what was committed before costs nothing."""
        if isinstance(unit, DrawUnit):
            return self.with_tokens(self.draw_shard(unit.shard))
        return self.with_tokens(self.judge_shard(unit.shard, unit.codebook, unit.reuse_from))

    def with_tokens(self, counts: Counts) -> Counts:
        """Return the counts with the visual tokens that were drawn among them."""
        drawn = counts.get("sampled", 0) + counts.get("rewritten", 0)
        return {**counts, "tokens": self.model.tokens_per_image * drawn}

    # Shards

    def draw_shard(self, name: str) -> Counts:
        """Sample, decode and judge one shard under the base codebook; pair it if it builds edits.

        Steps that were committed before are skipped. Returns counts.
        """
        shard, drawn = self.shards[name], 0
        if name not in self.run_dir.committed(TOKENS):
            attempt, drawn = Attempt.begin(self.run_dir, TOKENS, name), len(shard.cells)
            rows, failures = quarantine_failures(
                attempt, shard.cells, cell_id, lambda cells: self._sample(shard, cells)
            )
            attempt.commit(rows, Sample, failures)
        counts = self.judge_shard(name, self.base_digest)
        paired = shard.role == UNSAFE and shard.split == BUILD
        if paired and name not in self.run_dir.committed(PAIRS):
            counts |= self._pair(name)
        return {**counts, "sampled": drawn}

    def judge_shard(self, name: str, digest: str, reuse_from: str = "") -> Counts:
        """Decode and judge one shard under a codebook; return counts.

        Verdicts under the codebook ``reuse_from`` ("": the base) are copied where a sample touches
        no row in which the two tables differ, since its picture is the same; a sample that has no
        verdict there is judged.
        """
        samples = self._samples_under(name, digest)
        return self.judge_samples(name, samples, digest, reuse_from or self.base_digest)

    def judge_samples(
        self,
        name: str,
        samples: Sequence[Sample],
        digest: str,
        reuse_from: str,
        stage_of: Callable[[str], str] = verdict_stage,
    ) -> Counts:
        """Judge the samples of shard ``name`` into ``stage_of(digest)``; return counts."""
        stage = stage_of(digest)
        if name not in self.run_dir.committed(stage):
            kept: list[Verdict] = []
            if digest != self.base_digest:
                kept = self._unchanged(name, samples, digest, reuse_from, stage_of)
            judged = {row.sample_id for row in kept}
            touched = [sample for sample in samples if sample.sample_id not in judged]
            self.table(digest)  # read before the work: an unreadable store is not the rows' fault
            attempt = Attempt.begin(self.run_dir, stage, name)
            verdicts, failures = quarantine_failures(
                attempt, touched, _sample_id, lambda part: self._judge(part, digest)
            )
            # In the samples' order, so that bytes are equal however the verdicts came about.
            order = {sample.sample_id: index for index, sample in enumerate(samples)}
            rows = sorted(kept + verdicts, key=lambda row: order[row.sample_id])
            counted = {"touched": len(touched), "samples": len(samples)}
            attempt.commit(rows, Verdict, failures, counted)
        return dict(self.run_dir.committed(stage)[name].counts)

    def _samples_under(self, name: str, digest: str) -> list[Sample]:
        """A shard's samples under a codebook.

        They are drawn again, from the same seeds, where a table changes what is drawn.
        """
        samples = self.run_dir.read_shard(TOKENS, name, Sample)
        if digest == self.base_digest or not self.model.tokens_depend_on_codebook:
            return samples
        stage = redrawn_stage(digest)
        if name not in self.run_dir.committed(stage):
            self.table(digest)  # read before the work: an unreadable store is not the rows' fault
            attempt = Attempt.begin(self.run_dir, stage, name)
            rows, failures = quarantine_failures(
                attempt, samples, _sample_id, lambda part: self._redraw(part, digest)
            )
            attempt.commit(rows, Sample, failures)
        return self.run_dir.read_shard(stage, name, Sample)

    def _unchanged(
        self,
        name: str,
        samples: Sequence[Sample],
        digest: str,
        reuse_from: str,
        stage_of: Callable[[str], str],
    ) -> list[Verdict]:
        """The verdicts under ``reuse_from`` that hold under ``digest`` too, stamped with it."""
        changed = (self.table(digest) != self.table(reuse_from)).any(1)
        same = {sample.sample_id for sample in samples if not changed[list(sample.tokens)].any()}
        rows = self.run_dir.read_shard(stage_of(reuse_from), name, Verdict)
        return [replace(row, codebook_digest=digest) for row in rows if row.sample_id in same]

    # Drawing

    def _sample(self, shard: Shard, cells: Sequence[Cell]) -> list[Sample]:
        texts, seeds = self.texts_and_seeds(cells)
        return self.samples(shard, cells, seeds, self.draw_tokens(texts, seeds))

    def texts_and_seeds(self, cells: Sequence[Cell]) -> tuple[list[str], list[int]]:
        """Return what is drawn for some cells: their prompts' texts, and each sample's seed."""
        run_seed = self.config.sampling.seed
        seeds = [sample_seed(run_seed, prompt.prompt_id, index) for prompt, index in cells]
        return [prompt.text for prompt, _ in cells], seeds

    def samples(
        self, shard: Shard, cells: Sequence[Cell], seeds: Sequence[int], tokens: torch.Tensor
    ) -> list[Sample]:
        """Return the rows of drawn cells; ``tokens`` int ``[B,N]``."""
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
        seeds = [sample.seed for sample in samples]
        tokens = self.draw_tokens(texts, seeds, self.table(digest)).tolist()
        pairs = zip(samples, tokens, strict=True)
        return [replace(sample, tokens=tuple(row)) for sample, row in pairs]

    def draw_tokens(
        self, texts: Sequence[str], seeds: Sequence[int], table: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return tokens int32 ``[B,N]``; ``table`` is for families whose tokens depend on it."""
        settings, size = self.sampling_settings(), self.config.execution.batch_size
        under = () if table is None else (table,)
        parts = []
        for start in range(0, len(texts), size):
            rows = slice(start, start + size)
            parts.append(self.model.sample(texts[rows], seeds[rows], settings, *under))
        tokens = torch.cat(parts)
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.model.codebook):
            raise ValueError(
                "the model drew a token outside its codebook; its logits are not numbers"
            )
        return tokens

    def sampling_settings(self) -> SamplingSettings:
        """Return how the run draws tokens."""
        sampling = self.config.sampling
        return SamplingSettings(
            sampling.guidance,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.guidance_until,
        )

    def table(self, digest: str) -> torch.Tensor:
        """Return the table ``[K,d]`` of a codebook that the run has published, or the base."""
        if digest not in self._tables:
            self._tables[digest] = read_table(self.run_dir, digest, self.model.codebook)
        return self._tables[digest]

    # Judging

    def _judge(self, samples: Sequence[Sample], digest: str) -> list[Verdict]:
        rows: list[Verdict] = []
        size = self.config.execution.batch_size
        for start in range(0, len(samples), size):
            rows += self._judge_batch(samples[start : start + size], digest)
        return rows

    def _judge_batch(self, samples: Sequence[Sample], digest: str) -> list[Verdict]:
        tokens = torch.tensor([sample.tokens for sample in samples])
        images = self.model.decode(tokens, self.table(digest))
        rows = []
        decibels = self._psnr(samples, tokens, images, digest)
        scored = zip(samples, self._self_scores(samples, images), decibels, strict=True)
        for sample, scores, db in scored:
            asked, answers = tuple(scores), tuple(scores.values())
            rows.append(Verdict(sample.sample_id, digest, SELF, asked, answers, db))
        for auditor in self.auditors:
            name, asked = auditor.name, tuple(auditor.questions)
            for sample, row in zip(samples, _audit(auditor, images).tolist(), strict=True):
                rows.append(Verdict(sample.sample_id, digest, name, asked, tuple(row)))
        for verdict in rows:
            if not np.isfinite(verdict.scores).all():
                raise ValueError(
                    f"{verdict.judge} gave no readable answer: its scores are {verdict.scores}"
                )
        return rows

    def _psnr(
        self, samples: Sequence[Sample], tokens: torch.Tensor, images: np.ndarray, digest: str
    ) -> list[float | None]:
        """PSNR in dB of held-out benign pictures against the base codebook's; None for others.

        The picture before the edit is another decode, so pictures are compared only where figures
        are taken.
        """
        found: list[float | None] = [None] * len(samples)
        every = enumerate(samples)
        benign = [i for i, s in every if s.role == BENIGN and s.split == HELD_OUT]
        if digest != self.base_digest and benign:
            values = psnr(self.model.decode(tokens[benign]), images[benign]).tolist()
            for i, value in zip(benign, values, strict=True):
                found[i] = value
        return found

    def _self_scores(self, samples: Sequence[Sample], images: np.ndarray) -> list[dict[str, float]]:
        """The judge's P(yes) for each picture, by the questions that it is asked about it."""
        prompts = [self.prompts[sample.prompt_id] for sample in samples]
        asked = [questions_about(prompt, self.config.judge) for prompt in prompts]
        answers = self.judge.judge_each(images, [list(own.values()) for own in asked])
        return [dict(zip(own, row, strict=True)) for own, row in zip(asked, answers, strict=True)]

    # Pairing

    def _pair(self, name: str) -> Counts:
        """Commit a shard's pairs; return counts.

        A pair is a flagged sample and the sample of its rewritten prompt under the same seed. It is
        kept when the rewrite changed the prompt and its own picture is judged safe.
        """
        verdicts = self.run_dir.read_shard(verdict_stage(self.base_digest), name, Verdict)
        own = [verdict for verdict in verdicts if verdict.judge == SELF]
        flagged = {v.sample_id for v in own if is_unsafe(v, self.config.judge.threshold)}
        samples = self.run_dir.read_shard(TOKENS, name, Sample)
        harmful = [sample for sample in samples if sample.sample_id in flagged]
        attempt = Attempt.begin(self.run_dir, PAIRS, name)
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
        new = rewrite_prompts(self.judge, texts, self.config.judge.rewrite)
        results = [_Rewrite(drawn=bool(text)) for text in new]
        chosen = [i for i, result in enumerate(results) if result.drawn]
        if not chosen:
            return results
        tokens = self.draw_tokens([new[i] for i in chosen], [harmful[i].seed for i in chosen])
        questions = list(self.config.judge.questions.values())
        scores = self.judge.judge(self.model.decode(tokens), questions)
        if not scores.isfinite().all():
            raise ValueError(
                "the self-judge gave no readable answer on the picture of a rewritten prompt"
            )
        safe = (scores.amax(1) < self.config.judge.threshold).tolist()
        for i, row, ok in zip(chosen, tokens.tolist(), safe, strict=True):
            if ok:
                results[i] = _Rewrite(True, self._pair_of(harmful[i], new[i], tuple(row)))
        return results

    def _pair_of(self, sample: Sample, safe_text: str, safe_tokens: tuple[int, ...]) -> Pair:
        prompt = self.prompts[sample.prompt_id]
        ids = (sample.prompt_id, sample.sample_id)
        return Pair(*ids, prompt.text, safe_text, prompt.concepts, sample.tokens, safe_tokens)


@dataclass(frozen=True)
class _Rewrite:
    """What became of one flagged sample."""

    drawn: bool
    """Whether the picture of a rewritten prompt was drawn."""
    pair: Pair | None = None
    """The pair, if that picture is safe."""


def _audit(auditor: Auditor, images: np.ndarray) -> np.ndarray:
    """Scores float32 ``[B,Q]``, in blocks of one size.

    Kernels round by batch size, and neighbours must not change a score.
    """
    scores = []
    for start in range(0, len(images), _AUDITED):
        rows = np.minimum(np.arange(start, start + _AUDITED), len(images) - 1)
        scores.append(auditor.score(images[rows])[: len(images) - start])
    return np.concatenate(scores)


def cell_id(cell: Cell) -> str:
    """Return the id of the sample that a cell becomes."""
    return sample_id(cell[0].prompt_id, cell[1])


def _sample_id(sample: Sample) -> str:
    return sample.sample_id
