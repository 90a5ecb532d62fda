"""What one worker does for `isic evaluate`: draw and judge challenges, measure fidelity, attack.

It commits as it goes; what was committed before costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import torch

from isic_ray.codebook import ArtifactMeta, SafeCodebook, table_digest
from isic_ray.config.run import RunConfig
from isic_ray.judges.rewriting import rewrite_prompts
from isic_ray.metrics.fidelity import gmsd, ssim
from isic_ray.metrics.summary import SELF
from isic_ray.metrics.verdicts import flag_threshold, harm_score
from isic_ray.models.decoding.negative import sample_away
from isic_ray.runs.quarantine import Attempt, quarantine_failures
from isic_ray.runs.schema import (
    HELD_OUT,
    UNSAFE,
    Attack,
    Fidelity,
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
)
from isic_ray.workflows.attacks import recover, search, vocabulary
from isic_ray.workflows.challenges import NEGATIVE, REWRITE
from isic_ray.workflows.evaluation_units import (
    AttackUnit,
    DrawSetUnit,
    EvaluationUnit,
    FidelityUnit,
    JudgeSetUnit,
    RecoverUnit,
    in_set,
    verdicts_in_set,
)
from isic_ray.workflows.units import unfinished
from isic_ray.workflows.worker import Cell, ShardWorker, cell_id
from isic_ray.workflows.workers import Counts


class EvaluationWorker:
    """Measures with a `ShardWorker`'s models, on the run's own prompts and on challenges."""

    def __init__(self, config: RunConfig, uri: str) -> None:
        self.worker = ShardWorker(config, uri)
        self.config, self.run_dir = config, self.worker.run_dir
        self.model, self.judge = self.worker.model, self.worker.judge
        self.auditors = self.worker.auditors

    def run(self, unit: EvaluationUnit) -> Counts:
        """Run one unit and return its counts."""
        counts: Counts = {}
        if isinstance(unit, DrawSetUnit):
            counts = self._draw_set(unit)
        elif isinstance(unit, JudgeSetUnit):
            counts = self._judge_set(unit)
        elif unfinished(self.run_dir, [unit]):
            if isinstance(unit, FidelityUnit):
                self._measure_fidelity(unit)
            elif isinstance(unit, AttackUnit):
                self._attack(unit)
            else:
                self._recover(unit)
        return self.worker.with_tokens(counts)

    # Challenges

    def _shard(self, key: str, name: str) -> Shard:
        """The shard of a challenge, whose prompts the worker then knows."""
        prompts = self.run_dir.read(in_set(PROMPTS, key), Prompt)
        self.worker.prompts |= {prompt.prompt_id: prompt for prompt in prompts}
        shards = plan_shards(prompts, 1, self.run_dir.record["plan"]["shard_size"])
        return next(shard for shard in shards if shard.name == name)

    def _draw_set(self, unit: DrawSetUnit) -> Counts:
        shard, stage = self._shard(unit.key, unit.shard), in_set(TOKENS, unit.key)
        if self.run_dir.pending(stage, [unit.shard]):
            attempt = Attempt.begin(self.run_dir, stage, unit.shard)
            rows, failures = quarantine_failures(
                attempt, shard.cells, cell_id, lambda cells: self._draw_cells(shard, cells, unit)
            )
            attempt.commit(rows, Sample, failures)
        return self._judge_set(JudgeSetUnit(unit.key, unit.shard, unit.base))

    def _draw_cells(self, shard: Shard, cells: Sequence[Cell], unit: DrawSetUnit) -> list[Sample]:
        worker, options = self.worker, unit.options
        texts, seeds = worker.texts_and_seeds(cells)
        if unit.drawn_by == REWRITE:
            new = rewrite_prompts(self.judge, texts, options["instruction"])
            texts = [after or before for after, before in zip(new, texts, strict=True)]
        if unit.drawn_by == NEGATIVE:
            settings, scale = worker.sampling_settings(), float(options["scale"])
            tokens = sample_away(self.model, texts, seeds, settings, options["negative"], scale)
        else:
            tokens = worker.draw_tokens(texts, seeds)
        return worker.samples(shard, cells, seeds, tokens)

    def _judge_set(self, unit: JudgeSetUnit) -> Counts:
        if not unit.key:
            return self.worker.judge_shard(unit.shard, unit.codebook)
        self._shard(unit.key, unit.shard)
        samples = self.run_dir.read_shard(in_set(TOKENS, unit.key), unit.shard, Sample)
        base, stage_of = self.worker.base_digest, verdicts_in_set(unit.key)
        return self.worker.judge_samples(unit.shard, samples, unit.codebook, base, stage_of)

    # Cost

    def _measure_fidelity(self, unit: FidelityUnit) -> None:
        """Commit SSIM and GMSD of a benign shard's pictures under an edited codebook."""
        samples = self.run_dir.read_shard(TOKENS, unit.shard, Sample)
        tokens = torch.tensor([sample.tokens for sample in samples])
        before = self.model.decode(tokens)
        after = self.model.decode(tokens, self.worker.table(unit.codebook))
        values = zip(
            samples, ssim(before, after).tolist(), gmsd(before, after).tolist(), strict=True
        )
        rows = [Fidelity(sample.sample_id, a, b) for sample, a, b in values]
        ((stage, shard),) = unit.outputs
        self.run_dir.commit(stage, shard, rows, Fidelity)

    # Attacks

    def _attack(self, unit: AttackUnit) -> None:
        """Search for unsafe pictures from one part of the first held-out unsafe prompts."""
        own = self.run_dir.read(PROMPTS, Prompt)
        targets = [p for p in own if p.role == UNSAFE and p.split == HELD_OUT][: unit.count]
        targets = targets[unit.part :: unit.parts]
        table, settings = self.worker.table(unit.codebook), self.worker.sampling_settings()
        texts, seeds = self.worker.texts_and_seeds([(prompt, 0) for prompt in targets])
        found = search(
            self.model,
            table,
            self._harm,
            texts,
            seeds,
            vocabulary([prompt.text for prompt in own]),
            settings,
            unit.vary,
            unit.budget,
            self._success(),
        )
        first = self.model.sample(texts, seeds, settings)
        worst = self.model.sample(
            [one.text for one in found], [one.seed for one in found], settings
        )
        harms = [self._harms(self.model.decode(drawn, table)).tolist() for drawn in (first, worst)]
        judges = (SELF, *(auditor.name for auditor in self.auditors))
        rows = [
            Attack(prompt.prompt_id, one.text, one.seed, one.queries, judges, tuple(a), tuple(b))
            for prompt, one, a, b in zip(targets, found, *harms, strict=True)
        ]
        ((stage, shard),) = unit.outputs
        self.run_dir.commit(stage, shard, rows, Attack)

    def _success(self) -> float:
        """The harm at which a search rests: where the judge that the attacker sees flags."""
        judge = self.auditors[0].name if self.auditors else SELF
        return flag_threshold(judge, self.config.judge.threshold)

    def _harm(self, images: np.ndarray) -> np.ndarray:
        """What the attacker sees: the first auditor's score, as a stand-in for eyes.

        Without an auditor, the self-judge's.
        """
        return self._harms(images)[:, 1 if self.auditors else 0]

    def _harms(self, images: np.ndarray) -> np.ndarray:
        """The harm score ``[B,judges]`` of pictures by the self-judge and each auditor."""
        questions = list(self.config.judge.questions.values())
        columns = [self.judge.judge(images, questions).amax(1).numpy()]
        for auditor in self.auditors:
            asked, scores = tuple(auditor.questions), auditor.score(images)
            verdicts = [Verdict("", "", auditor.name, asked, tuple(row)) for row in scores]
            columns.append(np.array([harm_score(verdict) for verdict in verdicts]))
        return np.stack(columns, 1)

    def _recover(self, unit: RecoverUnit) -> None:
        """Fine-tune the edited table back with unsafe build pictures; publish what comes out."""
        pairs = sorted(self.run_dir.read(PAIRS, Pair), key=lambda pair: pair.sample_id)
        chosen = Random(0).sample(pairs, min(unit.pictures, len(pairs)))
        tokens = torch.tensor([pair.harmful_tokens for pair in chosen])
        table = recover(self.model, self.worker.table(unit.codebook), tokens, unit.steps)
        meta = ArtifactMeta("recovery attack", self.model.family)
        artifact = SafeCodebook.from_tables(self.model.codebook, table, meta)
        digest = table_digest(table)
        self.run_dir.put_blob(codebook_blob(digest), artifact.to_bytes())
        self.run_dir.put_blob(unit.blob, digest.encode())
