"""What the loop is made of: a run's data, and what is done to all of it at once by the workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from isic_ray.codebook import ArtifactMeta, Edit, SafeCodebook, build_edit, table_digest
from isic_ray.config.run import EditConfig, RunConfig
from isic_ray.execution.pool import ActorPool, Unit, start_pool, work
from isic_ray.execution.progress import Progress
from isic_ray.execution.training import DeltaJob, train_deltas, training_groups
from isic_ray.metrics import statistics
from isic_ray.metrics.verdicts import SELF, Verdicts
from isic_ray.models.base import ModelSpec
from isic_ray.runs.quarantine import quarantined_samples
from isic_ray.runs.run import Run
from isic_ray.runs.schema import BENIGN, BUILD, HELD_OUT, UNSAFE, Pair, Prompt, Sample, Verdict
from isic_ray.runs.shards import (
    PAIRS,
    TOKENS,
    Shard,
    codebook_blob,
    plan_shards,
    redrawn_stage,
    verdict_stage,
)

Record = dict[str, Any]


class Stages:
    """One run's prompts, pictures and pairs, and its workers. All data lies in the run
    directory.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Run,
        prompts: list[Prompt],
        facts: ModelSpec,
        progress: Progress,
    ) -> None:
        self.config, self.run_dir, self.facts, self.progress = config, run, facts, progress
        self.prompts = {prompt.prompt_id: prompt for prompt in prompts}
        size = run.record["plan"]["shard_size"]
        self.shards = plan_shards(prompts, config.prompts.samples_per_prompt, size)
        self.base_digest = table_digest(facts.codebook)
        self.crew: ActorPool | None = (
            None  # started by the first stage that draws or judges, if workers are kept
        )
        self.trainers = training_groups(config, run, facts.codebook)
        self.samples: list[Sample] = []
        self.pairs: list[Pair] = []
        self.touched: dict[
            str, int
        ] = {}  # by codebook: pictures that its last `judge` found changed
        self.spent: Record = {}  # seconds of each stage

    def of(self, split: str) -> list[Shard]:
        """The shards of a split."""
        return [shard for shard in self.shards if shard.split == split]

    def paired(self) -> list[str]:
        """The names of the shards from which pairs are built."""
        return [shard.name for shard in self.of(BUILD) if shard.role == UNSAFE]

    def pending(self) -> list[str]:
        """Shards of round 0 that lack one of their commits; also when damage was removed after
        the round's end.
        """
        plan = [shard.name for shard in self.shards]
        lacking = {*self.run_dir.pending(TOKENS, plan), *self.run_dir.pending(PAIRS, self.paired())}
        lacking |= set(self.run_dir.pending(verdict_stage(self.base_digest), plan))
        return [name for name in plan if name in lacking]

    def load(self) -> None:
        """Read what round 0 drew."""
        self.samples = self.run_dir.read(TOKENS, Sample, [shard.name for shard in self.shards])
        self.pairs = sorted(
            self.run_dir.read(PAIRS, Pair, self.paired()), key=lambda pair: pair.sample_id
        )

    def work(self, stage: str, units: list[Unit]) -> list[Record]:
        """Have the units done; returns their counts."""
        sizes = {shard.name: len(shard.cells) for shard in self.shards}
        self.progress.start(stage, sum(sizes[unit["shard"]] for unit in units), "pictures")
        uri = self.run_dir.store.uri
        if self.config.execution.keep_workers and self.crew is None:
            self.crew = start_pool(self.config, uri)
        counts = work(
            self.config,
            uri,
            units,
            lambda unit: sizes[unit["shard"]],
            self.progress,
            crew=self.crew,
        )
        self.spent[stage] = self.progress.finish()
        return counts

    def judge(self, digests: list[str], shards: list[Shard], stage: str, known: str = "") -> None:
        """Verdicts under each codebook; pictures that are the same under ``known`` ("": the
        base) keep theirs.
        """
        units: list[Unit] = []
        for digest in dict.fromkeys(digests):
            done = self.run_dir.committed(verdict_stage(digest))
            todo = [shard.name for shard in shards if shard.name not in done]
            units += [
                {"do": "judge", "shard": name, "codebook": digest, "known": known} for name in todo
            ]
        if units:
            self.work(stage, units)
        for digest in digests:
            commits = self.run_dir.committed(verdict_stage(digest))
            self.touched[digest] = sum(
                commits[shard.name].counts.get("touched", 0) for shard in shards
            )

    def evidence(self, digest: str, split: str = "") -> Verdicts:
        """All verdicts under a codebook; samples in quarantine, here or under the base, are left
        out.
        """
        rows = self.run_dir.read(verdict_stage(digest), Verdict)
        verdicts = {(row.judge, row.sample_id): row for row in rows}
        aside = quarantined_samples(
            self.run_dir, (verdict_stage(self.base_digest), verdict_stage(digest))
        )
        samples = [
            s for s in self.samples if (not split or s.split == split) and s.sample_id not in aside
        ]
        judges = (SELF, *self.config.judge.auditors)
        return Verdicts(self.prompts, samples, verdicts, judges, self.config.judge.threshold)

    def redrawn(self, digest: str) -> list[Sample]:
        """Samples drawn anew under a codebook; [] for families whose tokens do not depend on it."""
        if digest == self.base_digest or not self.facts.tokens_depend_on_codebook:
            return []
        return self.run_dir.read(redrawn_stage(digest), Sample)

    def edit(self, config: EditConfig, table: torch.Tensor, pairs: list[Pair]) -> Edit:
        """E′ of a table, from pairs."""
        return build_edit(
            table,
            torch.tensor([pair.harmful_tokens for pair in pairs]),
            torch.tensor([pair.safe_tokens for pair in pairs]),
            self.benign_tokens(),
            config,
            self.facts.normalised,
            seed=self.config.sampling.seed,
            concepts_of_pair=[pair.concepts for pair in pairs],
        )

    def benign_tokens(self) -> torch.Tensor:
        """int ``[B,N]``: tokens of the benign build samples."""
        return torch.tensor(
            [s.tokens for s in self.samples if s.role == BENIGN and s.split == BUILD]
        )

    def train(self, jobs: list[DeltaJob], rows: np.ndarray, stage: str) -> list[torch.Tensor]:
        """Each job's E″; without fine-tuning steps its E′ as it is."""
        if self.config.finetune.steps == 0:
            return [job.edited for job in jobs]
        self.progress.start(stage)
        tables = train_deltas(self.trainers, self.config.finetune, self.run_dir, jobs, rows)
        self.spent[stage] = self.progress.finish()
        return tables

    def publish(self, table: torch.Tensor, number: int, method: str) -> str:
        """Store an edited table as an artifact; returns its digest."""
        digest = table_digest(table)
        artifact = SafeCodebook.from_tables(
            self.facts.codebook, table, ArtifactMeta(method, self.facts.family, number)
        )
        self.run_dir.put_blob(codebook_blob(digest), artifact.to_bytes())
        return digest

    def table(self, digest: str) -> torch.Tensor:
        """An edited table that was published."""
        return SafeCodebook.from_bytes(self.run_dir.get_blob(codebook_blob(digest))).apply_to(
            self.facts.codebook
        )

    def calibration(self) -> Record:
        """Self-judge against each auditor on the base codebook's held-out pictures."""
        evidence = self.evidence(self.base_digest)
        samples = [sample for sample in evidence.samples if sample.split == HELD_OUT]
        own = np.array(evidence.unsafe(SELF, samples))
        return {
            name: statistics.agreement(own, np.array(evidence.unsafe(name, samples))).to_dict()
            for name in self.config.judge.auditors
        }
