"""`isic evaluate`: all the evidence on a finished run. `Evaluation.run` reads top to bottom; every
step is committed.

Nothing here changes the run's decisions: arms, challenges and attacks only measure, in stages of
their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch

from isic_ray.codebook import ArtifactMeta, SafeCodebook, build_edit, table_digest
from isic_ray.config.run import EditConfig, Method, RunConfig
from isic_ray.errors import UserError
from isic_ray.execution.pool import Unit, work
from isic_ray.execution.progress import Progress
from isic_ray.execution.session import ray_session
from isic_ray.metrics.results import EVIDENCE
from isic_ray.runs.run import Run
from isic_ray.runs.schema import BENIGN, BUILD, HELD_OUT, UNSAFE, Pair, Prompt, Sample
from isic_ray.runs.shards import PROMPTS, TOKENS, codebook_blob, plan_shards, verdict_stage
from isic_ray.workflows.attacks import SEEDS, WORDS, telling_words
from isic_ray.workflows.challenges import (
    FRESH,
    NEGATIVE,
    Challenge,
    attack_stage,
    embedded_challenges,
    fidelity_stage,
    file_challenges,
    in_set,
    input_arms,
    recovered_blob,
)
from isic_ray.workflows.evaluation_worker import EvidenceActor
from isic_ray.workflows.measurements import Measurements, Plan, Record

_TELLING = 5  # words of the negative prompt that is made from the run's own pairs


def evaluate(
    uri: str, plan: Plan, execution: Record | None = None, verbose: bool = False
) -> Record:
    """Measure the run at ``uri`` and write its evidence.json; the same call again goes on where it
    stopped.

    ``execution`` replaces settings of the run's execution section. Raises UserError for a run that
    has not ended, and for prompt files that can't be read.
    """
    run = Run.open(uri)
    if not run.store.exists("summary.json"):
        raise UserError(f"the run at {uri} has not ended; let it end before measuring it")
    config = _config(run)
    config = replace(config, execution=replace(config.execution, **(execution or {})))
    with ray_session(config.execution, verbose):
        return Evaluation(run, config, plan, Progress()).run()


class Evaluation(Measurements):
    """Measurements, and the work that they need; all data lies in the run directory."""

    def __init__(self, run: Run, config: RunConfig, plan: Plan, progress: Progress) -> None:
        super().__init__(run, config, plan)
        self.progress = progress

    # -- the steps
    # --------------------------------------------------------------------------------------------------

    def run(self) -> Record:
        """Build the arms, draw the challenges, judge everything, attack, and put the figures
        together.
        """
        started = time.monotonic()
        edits, without = self.edits(), self.without_each_concept()
        challenges, inputs = self.challenges(), self.inputs()
        self.draw([*challenges, *inputs])
        recovered = self.recovered()
        self.judge(challenges, edits, without, list(recovered.values()))
        evidence: Record = {
            "schema": 1,
            "fingerprint": self.run_dir.record["fingerprint"],
            "model": self.summary["model"],
            "codebook": self.best,
            "arms": self.arms(edits, inputs),
            "challenges": self.challenge_figures(challenges),
            "held_out_concepts": self.concept_figures(challenges, edits, without),
            "attacks": self.attack_figures(),
            "recovery": self.recovery_figures(recovered),
            "quality": self.quality(),
            "judges": self.judges(challenges),
            "explanation": self.explanation(),
            "alarm": self.alarm(),
            "plan": {**dataclasses.asdict(self.plan), "negative": self.negative()},
        }
        evidence |= {"seconds": round(time.monotonic() - started, 1), "driver": hardware()}
        self.run_dir.store.put(EVIDENCE, json.dumps(evidence, indent=1, allow_nan=False).encode())
        return evidence

    def edits(self) -> dict[str, str]:
        """Digests of one-round edits without fine-tuning, built from all pairs, by arm."""
        methods: dict[str, Method] = {
            "random subspace": "random",
            "paper": "paper",
            "selective": "selective",
            "transport": "transport",
        }
        tables = {}
        for name, method in methods.items():
            tables[name] = self.edit(
                EditConfig(method=method, rank=self.config.edit.rank), self.pairs
            )
        tables["random rows"] = self.random_rows()
        return {name: self.publish(table, name) for name, table in tables.items()}

    def without_each_concept(self) -> dict[str, str]:
        """For each concept the digest of a transport edit from the pairs that do not show it."""
        concepts = sorted({concept for pair in self.pairs for concept in pair.concepts})
        found = {}
        for concept in concepts:
            rest = [pair for pair in self.pairs if concept not in pair.concepts]
            if rest:
                table = self.edit(EditConfig(method="transport", rank=self.config.edit.rank), rest)
                found[concept] = self.publish(table, f"transport without {concept}")
        return found

    def challenges(self) -> list[Challenge]:
        plan = self.plan
        found = file_challenges(plan.unsafe_files, UNSAFE, plan.limit, self.own)
        found += file_challenges(plan.benign_files, BENIGN, plan.limit, self.own)
        if self.config.prompts.unsafe.startswith("pictogram:") and plan.limit:
            found = embedded_challenges(plan.limit, self.own) + found
        return found

    def inputs(self) -> list[Challenge]:
        arms = input_arms(
            self.own, self.negative(), self.plan.negative_scale, self.config.judge.rewrite
        )
        return [
            arm for arm in arms if arm.way != NEGATIVE or self.facts.family == "janus"
        ]  # see models.negative

    def negative(self) -> str:
        """The negative prompt: as planned, or the words that the run's own rewrites took out of
        its prompts.
        """
        words = telling_words(
            [p.unsafe_text for p in self.pairs], [p.safe_text for p in self.pairs], _TELLING
        )
        return self.plan.negative or " and ".join(words)

    def draw(self, challenges: list[Challenge]) -> None:
        units: list[Unit] = []
        for one in challenges:
            self.run_dir.commit(in_set(PROMPTS, one.key), "all", list(one.prompts), Prompt)
            units += [
                {"do": "draw", "set": one.key, "shard": shard.name, "way": one.way, **one.options}
                for shard in plan_shards(one.prompts, 1, self.size)
            ]
        if self.plan.recovery_pictures:
            units += [
                {
                    "do": "recover",
                    "codebook": self.best,
                    "steps": str(n),
                    "count": str(self.plan.recovery_pictures),
                }
                for n in self.plan.recovery_steps
            ]
        self.work("evidence: draw", units)

    def judge(
        self,
        challenges: list[Challenge],
        edits: dict[str, str],
        without: dict[str, str],
        recovered: list[str],
    ) -> None:
        shards = plan_shards(self.own, self.config.prompts.samples_per_prompt, self.size)
        held_out = [shard for shard in shards if shard.split == HELD_OUT]
        unsafe = [shard for shard in held_out if shard.role == UNSAFE]
        units = [_judge("", shard.name, digest) for digest in edits.values() for shard in held_out]
        units += [_judge("", shard.name, digest) for digest in recovered for shard in unsafe]
        for one in challenges:
            more = [*without.values(), edits["transport"]] if one.name == FRESH else []
            for shard in plan_shards(one.prompts, 1, self.size):
                units += [_judge(one.key, shard.name, digest) for digest in [self.best, *more]]
        benign = [shard for shard in held_out if shard.role == BENIGN]
        units += [
            {"do": "fidelity", "shard": shard.name, "codebook": self.best} for shard in benign
        ]
        units += self.attacks()
        self.work("evidence: judge and attack", units)

    def attacks(self) -> list[Unit]:
        """Searches over words and over seeds, about eight prompts a unit."""
        plan = self.plan
        parts = max(1, -(-plan.attacked // 8))
        return [
            {
                "do": "attack",
                "vary": vary,
                "shard": str(part),
                "parts": str(parts),
                "count": str(plan.attacked),
                "rounds": str(plan.budget.rounds),
                "proposals": str(plan.budget.proposals),
                "codebook": self.best,
            }
            for vary in (WORDS, SEEDS)
            for part in range(parts)
            if plan.attacked
        ]

    # -- what they stand on
    # -----------------------------------------------------------------------------------------

    def work(self, stage: str, units: list[Unit]) -> None:
        units = [unit for unit in units if not self.done(unit)]
        if not units:
            return
        self.progress.start(stage, len(units), "units")
        work(
            self.config, self.run_dir.store.uri, units, lambda unit: 1, self.progress, EvidenceActor
        )
        self.progress.finish()

    def done(self, unit: Unit) -> bool:
        """Whether all that a unit would commit is there."""
        if unit["do"] == "recover":
            folder, _, file = recovered_blob(
                unit["codebook"], int(unit["steps"]), int(unit["count"])
            ).partition("/")
            return file in self.run_dir.committed(folder)
        if unit["do"] == "fidelity":
            stages = [fidelity_stage(unit["codebook"])]
        elif unit["do"] == "attack":
            stages = [
                attack_stage(unit["codebook"], unit["vary"], self.plan.budget, self.plan.attacked)
            ]
        else:
            stages = [in_set(verdict_stage(unit.get("codebook", self.base)), unit["set"])]
            stages += [in_set(TOKENS, unit["set"])] if unit["do"] == "draw" else []
        return all(unit["shard"] in self.run_dir.committed(stage) for stage in stages)

    def edit(self, config: EditConfig, pairs: list[Pair]) -> torch.Tensor:
        benign = [
            s.tokens
            for s in self.run_dir.read(TOKENS, Sample)
            if s.role == BENIGN and s.split == BUILD
        ]
        return build_edit(
            self.facts.codebook,
            torch.tensor([pair.harmful_tokens for pair in pairs]),
            torch.tensor([pair.safe_tokens for pair in pairs]),
            torch.tensor(benign),
            config,
            self.facts.normalised,
            seed=self.config.sampling.seed,
            concepts_of_pair=[pair.concepts for pair in pairs],
        ).codebook

    def random_rows(self) -> torch.Tensor:
        """Control: as many rows as the run changed, picked at random among those in use, each
        swapped for another.
        """
        base = self.facts.codebook
        tokens = torch.tensor([pair.harmful_tokens + pair.safe_tokens for pair in self.pairs])
        used = torch.unique(tokens)
        count = min(len(used), int((self.table(self.best) != base).any(1).sum()))
        generator = torch.Generator().manual_seed(self.config.sampling.seed)
        chosen = used[torch.randperm(len(used), generator=generator)[:count]]
        table = base.clone()
        table[chosen] = base[used[torch.randint(len(used), (count,), generator=generator)]]
        return table

    def publish(self, table: torch.Tensor, method: str) -> str:
        digest = table_digest(table)
        artifact = SafeCodebook.from_tables(
            self.facts.codebook, table, ArtifactMeta(method, self.facts.family)
        )
        self.run_dir.put_blob(codebook_blob(digest), artifact.to_bytes())
        return digest


def hardware() -> str:
    """The driver's machine in words, such as "AMD EPYC 7003, 2 cores, no GPU"."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            name,
        )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, {os.cpu_count()} cores, {gpu}"


def _judge(key: str, shard: str, digest: str) -> Unit:
    return {"do": "judge", "set": key, "shard": shard, "codebook": digest}


def _config(run: Run) -> RunConfig:
    """The configuration that a run was made with. Raises UserError when this version has other
    settings.
    """
    record = run.record["config"]
    try:
        return RunConfig(
            **{
                option.name: type(getattr(RunConfig(), option.name))(**record[option.name])
                for option in dataclasses.fields(RunConfig)
            }
        )
    except (KeyError, TypeError, UserError) as error:
        raise UserError(
            f"{run.store.uri} was made with other settings than this version knows: {error}"
        ) from error
