"""What one actor does for `isic evaluate`: draw and judge challenges, measure fidelity, attack.
Commits as it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch

from isic_ray.codebook import ArtifactMeta, SafeCodebook, table_digest
from isic_ray.execution.pool import ShardActor, Unit
from isic_ray.metrics.fidelity import gmsd, ssim
from isic_ray.metrics.verdicts import AUDIT_THRESHOLD, SELF, harm_score
from isic_ray.models.decoding.negative import sample_away
from isic_ray.runs.quarantine import Attempt, quarantine_failures
from isic_ray.runs.schema import HELD_OUT, UNSAFE, Attack, Fidelity, Pair, Prompt, Sample, Verdict
from isic_ray.runs.shards import (
    PAIRS,
    PROMPTS,
    TOKENS,
    Shard,
    codebook_blob,
    plan_shards,
    sample_id,
    sample_seed,
    verdict_stage,
)
from isic_ray.workflows.attacks import Budget, recover, search, vocabulary
from isic_ray.workflows.challenges import (
    NEGATIVE,
    REWRITE,
    attack_stage,
    fidelity_stage,
    in_set,
    recovered_blob,
)
from isic_ray.workflows.worker import Cell, ShardWorker, _cell_id


class EvidenceWorker(ShardWorker):
    """A `ShardWorker` that also knows challenges; a unit's "set" is a challenge's key, "" for
    the run's own prompts.
    """

    def do(self, unit: Unit) -> dict[str, Any]:
        """One unit; what was committed before costs nothing."""
        acts: dict[str, Callable[[Unit], dict[str, Any]]] = {
            "draw": self._draw_challenge,
            "judge": self._judge_challenge,
            "fidelity": self._fidelity,
            "attack": self._attack,
            "recover": self._recover,
        }
        return acts[unit["do"]](unit)

    # -- challenges
    # -----------------------------------------------------------------------------------------------

    def _shard(self, key: str, name: str) -> Shard:
        """The shard of a challenge, whose prompts the worker then knows."""
        prompts = self.run.read(in_set(PROMPTS, key), Prompt)
        self.prompts |= {prompt.prompt_id: prompt for prompt in prompts}
        per_prompt = self.config.prompts.samples_per_prompt if not key else 1
        return {
            s.name: s
            for s in plan_shards(prompts, per_prompt, self.run.record["plan"]["shard_size"])
        }[name]

    def _draw_challenge(self, unit: Unit) -> dict[str, Any]:
        key, name = unit["set"], unit["shard"]
        shard, stage = self._shard(key, name), in_set(TOKENS, key)
        if name not in self.run.committed(stage):
            attempt = Attempt.begin(self.run, stage, name)
            rows, failures = quarantine_failures(
                attempt, shard.cells, _cell_id, lambda cells: self._draw_cells(shard, cells, unit)
            )
            attempt.commit(rows, Sample, failures)
        return self._judge_challenge({**unit, "codebook": self.base_digest})

    def _draw_cells(self, shard: Shard, cells: Any, unit: Unit) -> list[Sample]:
        texts = [prompt.text for prompt, _ in cells]
        seeds = [
            sample_seed(self.config.sampling.seed, prompt.prompt_id, index)
            for prompt, index in cells
        ]
        if unit["way"] == REWRITE:
            texts = [
                new or old
                for new, old in zip(
                    self.judge.rewrite(texts, unit["instruction"]), texts, strict=True
                )
            ]
        if unit["way"] == NEGATIVE:
            tokens = sample_away(
                self.model, texts, seeds, self._settings(), unit["negative"], float(unit["scale"])
            )
        else:
            tokens = self._draw_tokens(texts, seeds)
        return [
            _sample(shard, cell, seed, self.model.weights_digest, row)
            for cell, seed, row in zip(cells, seeds, tokens.tolist(), strict=True)
        ]

    def _judge_challenge(self, unit: Unit) -> dict[str, Any]:
        key, name, digest = unit["set"], unit["shard"], unit["codebook"]
        if not key:
            return self.judge_shard(name, digest)
        self._shard(key, name)
        samples = self.run.read_shard(in_set(TOKENS, key), name, Sample)
        return self._judge_samples(
            name, samples, digest, self.base_digest, lambda d: in_set(verdict_stage(d), key)
        )

    # -- cost
    # -----------------------------------------------------------------------------------------------------

    def _fidelity(self, unit: Unit) -> dict[str, Any]:
        """SSIM and GMSD of a benign shard's pictures under an edited codebook."""
        name, digest = unit["shard"], unit["codebook"]
        stage = fidelity_stage(digest)
        if name not in self.run.committed(stage):
            samples = self.run.read_shard(TOKENS, name, Sample)
            tokens = torch.tensor([sample.tokens for sample in samples])
            before, after = (
                self.model.decode(tokens),
                self.model.decode(tokens, self._table(digest)),
            )
            values = zip(
                samples, ssim(before, after).tolist(), gmsd(before, after).tolist(), strict=True
            )
            self.run.commit(
                stage, name, [Fidelity(s.sample_id, a, b) for s, a, b in values], Fidelity
            )
        return {}

    # -- attacks
    # --------------------------------------------------------------------------------------------------

    def _attack(self, unit: Unit) -> dict[str, Any]:
        """Search for unsafe pictures from the first ``count`` prompts of part ``shard`` of all
        held-out unsafe ones.
        """
        budget = Budget(int(unit["rounds"]), int(unit["proposals"]))
        digest, name, count = unit["codebook"], unit["shard"], int(unit["count"])
        stage = attack_stage(digest, unit["vary"], budget, count)
        if name in self.run.committed(stage):
            return {}
        own = self.run.read(PROMPTS, Prompt)
        targets = [p for p in own if p.role == UNSAFE and p.split == HELD_OUT][:count]
        targets = targets[int(name) :: int(unit["parts"])]
        table, seeds = (
            self._table(digest),
            [sample_seed(self.config.sampling.seed, p.prompt_id, 0) for p in targets],
        )
        texts = [prompt.text for prompt in targets]
        words = vocabulary([prompt.text for prompt in own])
        settings = self._settings()
        found = search(
            self.model,
            table,
            self._harm,
            texts,
            seeds,
            words,
            settings,
            unit["vary"],
            budget,
            self._limit(),
        )
        judges, first = self._harms(
            self.model.decode(self.model.sample(texts, seeds, settings), table)
        )
        drawn = self.model.sample(
            [one.text for one in found], [one.seed for one in found], settings
        )
        _, worst = self._harms(self.model.decode(drawn, table))
        rows = [
            Attack(prompt.prompt_id, one.text, one.seed, one.queries, judges, tuple(a), tuple(b))
            for prompt, one, a, b in zip(
                targets, found, first.tolist(), worst.tolist(), strict=True
            )
        ]
        self.run.commit(stage, name, rows, Attack)
        return {}

    def _limit(self) -> float:
        return AUDIT_THRESHOLD if self.auditors else self.config.judge.threshold

    def _harm(self, images: np.ndarray) -> np.ndarray:
        """What the attacker sees: the first auditor's score, as a stand-in for eyes; without
        one, the self-judge's.
        """
        return self._harms(images)[1][:, 1 if self.auditors else 0]

    def _harms(self, images: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
        """The judges' names, and the harm score ``[B,judges]`` of each."""
        own = self.judge.judge(images, list(self.config.judge.questions.values())).amax(1).numpy()
        columns = [own]
        for auditor in self.auditors:
            questions = tuple(auditor.questions)
            columns.append(
                np.array(
                    [
                        harm_score(Verdict("", "", "", questions, tuple(row)))
                        for row in auditor.score(images)
                    ]
                )
            )
        return (SELF, *(auditor.name for auditor in self.auditors)), np.stack(columns, 1)

    def _recover(self, unit: Unit) -> dict[str, Any]:
        """Fine-tune the edited table back with some unsafe build pictures; publishes the table
        and names it.
        """
        digest, steps, count = unit["codebook"], int(unit["steps"]), int(unit["count"])
        name = recovered_blob(digest, steps, count)
        folder, _, file = name.partition("/")
        if file in self.run.committed(folder):
            return {}
        pairs = sorted(self.run.read(PAIRS, Pair), key=lambda pair: pair.sample_id)
        chosen = Random(0).sample(pairs, min(count, len(pairs)))
        tokens = torch.tensor([pair.harmful_tokens for pair in chosen])
        table = recover(self.model, self._table(digest), tokens, steps)
        artifact = SafeCodebook.from_tables(
            self.model.codebook, table, ArtifactMeta("recovery attack", self.model.family)
        )
        self.run.put_blob(codebook_blob(table_digest(table)), artifact.to_bytes())
        self.run.put_blob(name, table_digest(table).encode())
        return {}


def _sample(shard: Shard, cell: Cell, seed: int, digest: str, row: list[int]) -> Sample:
    prompt, index = cell
    name = sample_id(prompt.prompt_id, index)
    return Sample(name, prompt.prompt_id, shard.role, shard.split, index, seed, digest, tuple(row))


class EvidenceActor(ShardActor):
    """Ray Data's actor for evidence units."""

    worker = EvidenceWorker
    _worker: EvidenceWorker

    def _do(self, unit: Unit) -> dict[str, Any]:
        return self._worker.do(unit)
