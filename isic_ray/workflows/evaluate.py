"""`isic evaluate`: all the evidence on a finished run. `Evaluation.run` reads top to bottom.

Nothing here changes the run's decisions: arms, challenges and attacks only measure, in stages of
their own, and every step is committed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from isic_ray.codebook import ArtifactMeta, SafeCodebook, build_edit, table_digest
from isic_ray.config.run import EditConfig, Method
from isic_ray.execution.pool import RayWorkers
from isic_ray.execution.progress import Progress
from isic_ray.execution.session import ray_session
from isic_ray.metrics.results import EVIDENCE, RunResults
from isic_ray.metrics.summary import RESULTS_VERSION
from isic_ray.models.registry import read_spec
from isic_ray.runs.schema import BENIGN, HELD_OUT, UNSAFE, Pair, Prompt
from isic_ray.runs.shards import PROMPTS, Shard, codebook_blob, plan_shards
from isic_ray.workflows.attacks import SEEDS, WORDS, telling_words
from isic_ray.workflows.challenges import (
    FRESH,
    NEGATIVE,
    Challenge,
    embedded_challenges,
    file_challenges,
    input_arms,
)
from isic_ray.workflows.evaluation_units import (
    AttackUnit,
    DrawSetUnit,
    EvaluationUnit,
    FidelityUnit,
    JudgeSetUnit,
    RecoverUnit,
    in_set,
)
from isic_ray.workflows.evaluation_worker import EvaluationWorker
from isic_ray.workflows.measures import Measures, Plan, Record
from isic_ray.workflows.units import unfinished
from isic_ray.workflows.workers import Workers

_TELLING = 5  # words of the negative prompt that is made from the run's own pairs
_PROMPTS_PER_ATTACK = 8
_METHODS: dict[str, Method] = {
    "random subspace": "random",
    "paper": "paper",
    "selective": "selective",
    "transport": "transport",
}


def evaluate(
    uri: str, plan: Plan, execution: Record | None = None, verbose: bool = False
) -> Record:
    """Measure the run at ``uri``, write its evidence.json and return that.

    The same call again goes on where it stopped. ``execution`` replaces settings of the run's
    execution section. Raises UserError for a run that has not ended, and for prompt files that
    can't be read.
    """
    results = RunResults.open(uri)
    asked = dataclasses.replace(results.config.execution, **(execution or {}))
    config = dataclasses.replace(results.config, execution=asked)
    with (
        ray_session(config.execution, verbose),
        closing(RayWorkers(EvaluationWorker, config, results.run.store.uri)) as workers,
    ):
        return Evaluation(results, plan, workers, Progress()).run()


class Evaluation:
    """The work that `Measures` needs; all data lies in the run directory."""

    def __init__(
        self, results: RunResults, plan: Plan, workers: Workers, progress: Progress
    ) -> None:
        self.results, self.plan, self.workers, self.progress = results, plan, workers, progress
        self.config, self.run_dir = results.config, results.run
        self.spec = read_spec(self.config.model)
        self.measures = Measures(results, self.spec, plan)
        self.own = list(results.prompts.values())

    def run(self) -> Record:
        """Build the arms, draw the challenges, judge everything, attack, and measure."""
        started, measures = time.monotonic(), self.measures
        edits, without = self.edits(), self.without_each_concept()
        challenges, inputs = self.challenges(), self.inputs()
        self.draw([*challenges, *inputs])
        recovered = measures.recovered()
        self.judge(challenges, edits, without, list(recovered.values()))
        evidence: Record = {
            "schema": RESULTS_VERSION,
            "fingerprint": self.run_dir.record["fingerprint"],
            "model": vars(self.results.summary.model),
            "codebook": self.results.best,
            "arms": measures.arms(edits, inputs),
            "challenges": measures.challenges(challenges),
            "held_out_concepts": measures.concepts(challenges, edits, without),
            "attacks": measures.attacks(),
            "recovery": measures.recovery(recovered),
            "quality": measures.quality(),
            "judges": measures.judges(challenges),
            "explanation": self.results.explanation(self.spec.codebook, self.spec.normalised).facts,
            "alarm": measures.alarm(),
            "plan": {**dataclasses.asdict(self.plan), "negative": self.negative()},
            "seconds": round(time.monotonic() - started, 1),
            "driver": hardware(),
        }
        self.run_dir.store.put(EVIDENCE, json.dumps(evidence, indent=1, allow_nan=False).encode())
        return evidence

    # What is measured

    def edits(self) -> dict[str, str]:
        """Publish one-round edits without fine-tuning, built from all pairs; digests by arm."""
        tables = {name: self._edit(m, self.results.pairs) for name, m in _METHODS.items()}
        tables["random rows"] = self._random_rows()
        return {name: self._publish(table, name) for name, table in tables.items()}

    def without_each_concept(self) -> dict[str, str]:
        """Publish, for each concept, a transport edit from the pairs that do not show it."""
        pairs, found = self.results.pairs, {}
        for concept in sorted({concept for pair in pairs for concept in pair.concepts}):
            rest = [pair for pair in pairs if concept not in pair.concepts]
            if rest:
                table = self._edit("transport", rest)
                found[concept] = self._publish(table, f"transport without {concept}")
        return found

    def challenges(self) -> list[Challenge]:
        """Return the prompt sets beside the run's own: embedded ones, and the user's files."""
        plan = self.plan
        found = file_challenges(plan.unsafe_files, UNSAFE, plan.limit, self.own)
        found += file_challenges(plan.benign_files, BENIGN, plan.limit, self.own)
        if self.config.prompts.unsafe.startswith("pictogram:") and plan.limit:
            found = embedded_challenges(plan.limit, self.own) + found
        return found

    def inputs(self) -> list[Challenge]:
        """Return the input-side arms that the family can draw."""
        scale, rewrite = self.plan.negative_scale, self.config.judge.rewrite
        arms = input_arms(self.own, self.negative(), scale, rewrite)
        # Only Janus's sampler mixes in a negative prompt (isic_ray.models.decoding.negative).
        return [arm for arm in arms if arm.drawn_by != NEGATIVE or self.spec.family == "janus"]

    def negative(self) -> str:
        """Return the negative prompt: as planned, or the words that the run's rewrites took out."""
        pairs = self.results.pairs
        unsafe, safe = [p.unsafe_text for p in pairs], [p.safe_text for p in pairs]
        return self.plan.negative or " and ".join(telling_words(unsafe, safe, _TELLING))

    # The work

    def draw(self, challenges: Sequence[Challenge]) -> None:
        """Draw the challenges under the base codebook, and run the recovery attacks."""
        units: list[EvaluationUnit] = []
        for one in challenges:
            self.run_dir.commit(in_set(PROMPTS, one.key), "all", list(one.prompts), Prompt)
            units += [
                DrawSetUnit(one.key, shard.name, self.results.base, one.drawn_by, one.options)
                for shard in self._shards(one)
            ]
        if self.plan.recovery_pictures:
            units += [
                RecoverUnit(self.results.best, steps, self.plan.recovery_pictures)
                for steps in self.plan.recovery_steps
            ]
        self._run("evidence: draw", units)

    def judge(
        self,
        challenges: Sequence[Challenge],
        edits: dict[str, str],
        without: dict[str, str],
        recovered: Sequence[str],
    ) -> None:
        """Judge every arm, challenge and recovered table, measure fidelity, and attack."""
        best, size = self.results.best, self.run_dir.record["plan"]["shard_size"]
        shards = plan_shards(self.own, self.config.prompts.samples_per_prompt, size)
        held_out = [shard for shard in shards if shard.split == HELD_OUT]
        unsafe = [shard for shard in held_out if shard.role == UNSAFE]
        benign = [shard for shard in held_out if shard.role == BENIGN]
        units: list[EvaluationUnit] = []
        units += [JudgeSetUnit("", s.name, digest) for digest in edits.values() for s in held_out]
        units += [JudgeSetUnit("", s.name, digest) for digest in recovered for s in unsafe]
        for one in challenges:
            more = [*without.values(), edits["transport"]] if one.name == FRESH else []
            for shard in self._shards(one):
                units += [JudgeSetUnit(one.key, shard.name, each) for each in [best, *more]]
        units += [FidelityUnit(shard.name, best) for shard in benign]
        units += self._attacks()
        self._run("evidence: judge and attack", units)

    def _shards(self, challenge: Challenge) -> list[Shard]:
        return plan_shards(challenge.prompts, 1, self.run_dir.record["plan"]["shard_size"])

    def _attacks(self) -> list[AttackUnit]:
        """Searches over words and over seeds, some prompts per unit."""
        plan = self.plan
        parts = max(1, -(-plan.attacked // _PROMPTS_PER_ATTACK))
        return [
            AttackUnit(vary, part, parts, plan.attacked, plan.budget, self.results.best)
            for vary in (WORDS, SEEDS)
            for part in range(parts)
            if plan.attacked
        ]

    def _run(self, stage: str, units: Sequence[EvaluationUnit]) -> None:
        todo = unfinished(self.run_dir, units)
        if todo:
            self.progress.start(stage, len(todo), "units")
            self.workers.run(todo, [1] * len(todo), self.progress)
            self.progress.finish()

    def _edit(self, method: Method, pairs: Sequence[Pair]) -> torch.Tensor:
        """E′ ``[K,d]`` of the base table by one method."""
        return build_edit(
            self.spec.codebook,
            torch.tensor([pair.harmful_tokens for pair in pairs]),
            torch.tensor([pair.safe_tokens for pair in pairs]),
            self.results.benign_tokens(),
            EditConfig(method=method, rank=self.config.edit.rank),
            self.spec.normalised,
            seed=self.config.sampling.seed,
            concepts_of_pair=[pair.concepts for pair in pairs],
        ).codebook

    def _random_rows(self) -> torch.Tensor:
        """A control: as many rows in use as the run changed, picked at random and swapped."""
        base = self.spec.codebook
        pairs = [pair.harmful_tokens + pair.safe_tokens for pair in self.results.pairs]
        used = torch.unique(torch.tensor(pairs))
        changed = int((self.results.table(self.results.best, base) != base).any(1).sum())
        count = min(len(used), changed)
        generator = torch.Generator().manual_seed(self.config.sampling.seed)
        chosen = used[torch.randperm(len(used), generator=generator)[:count]]
        table = base.clone()
        table[chosen] = base[used[torch.randint(len(used), (count,), generator=generator)]]
        return table

    def _publish(self, table: torch.Tensor, method: str) -> str:
        digest, meta = table_digest(table), ArtifactMeta(method, self.spec.family)
        artifact = SafeCodebook.from_tables(self.spec.codebook, table, meta)
        self.run_dir.put_blob(codebook_blob(digest), artifact.to_bytes())
        return digest


def hardware() -> str:
    """Name the driver's machine in words, such as "AMD EPYC 7003, 2 cores, no GPU"."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(models, name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, {os.cpu_count()} cores, {gpu}"
