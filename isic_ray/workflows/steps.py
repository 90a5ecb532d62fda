"""What the loop is made of: each step does one thing to a whole run and commits it.

Steps return values; what is done when, and what is kept, is decided in `isic_ray.workflows.loop`.
A step that was committed before costs nothing, so a run that is started again goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from isic_ray.codebook import ArtifactMeta, Edit, SafeCodebook, build_edit, table_digest
from isic_ray.codebook.edit import interpolate
from isic_ray.codebook.usage import UsageCounts
from isic_ray.config.run import EditConfig, RunConfig
from isic_ray.errors import UserError
from isic_ray.execution.progress import Progress
from isic_ray.execution.training import DeltaJob, Train, has_blob
from isic_ray.metrics.results import read_rounds, read_table, read_verdicts
from isic_ray.metrics.summary import Arm, ModelName, Quarantined, Round, Summary
from isic_ray.metrics.verdicts import Verdicts, divergence
from isic_ray.models.base import ModelSpec
from isic_ray.runs.quarantine import quarantine_summary
from isic_ray.runs.run import Run
from isic_ray.runs.schema import BENIGN, BUILD, HELD_OUT, UNSAFE, Pair, Prompt, Sample
from isic_ray.runs.shards import (
    PAIRS,
    TOKENS,
    Shard,
    codebook_blob,
    plan_shards,
    redrawn_stage,
    verdict_stage,
)
from isic_ray.workflows.training_rows import harmful_rows, keep_rows, pair_rows, safe_rows
from isic_ray.workflows.units import DrawUnit, JudgeUnit, unfinished
from isic_ray.workflows.workers import Counts, Workers


@dataclass(frozen=True)
class KeptRound:
    """The best codebook so far: its round, its table ``[K,d]``, and the best before it.

    ``verdicts`` are on held-out pictures, which decided the round; of the base codebook, which is
    round 0, on all of them. ``before`` is None for the base.
    """

    round: Round
    table: torch.Tensor
    verdicts: Verdicts
    before: KeptRound | None = None

    @property
    def codebook(self) -> str:
        """Digest of the table."""
        return self.round.codebook

    def lineage(self) -> list[KeptRound]:
        """Return the kept rounds from the base codebook to this one."""
        return [*(self.before.lineage() if self.before else []), self]


class Steps:
    """One run's prompts, pictures and pairs, and the workers that its steps use.

    ``workers`` draw and judge, ``train`` fine-tunes; the caller closes them. With
    ``judge_ahead`` a round that is kept also judges the pictures that the next edit is built from;
    without it, the next round does so when it begins. ``announce`` is called when a round begins,
    with its number and the best codebook before it.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Run,
        prompts: Sequence[Prompt],
        spec: ModelSpec,
        workers: Workers,
        train: Train,
        progress: Progress,
        *,
        judge_ahead: bool = True,
        announce: Callable[[int, KeptRound], None] = lambda number, best: None,
    ) -> None:
        self.config, self.run_dir, self.spec = config, run, spec
        self.workers, self.progress, self._train_jobs = workers, progress, train
        self._judge_ahead, self.announce = judge_ahead, announce
        self.prompts = {prompt.prompt_id: prompt for prompt in prompts}
        size = run.record["plan"]["shard_size"]
        self.shards = plan_shards(prompts, config.prompts.samples_per_prompt, size)
        self.base = table_digest(spec.codebook)
        self.samples: list[Sample] = []
        self.pairs: list[Pair] = []
        self.touched: dict[str, int] = {}
        """By codebook: pictures that `judge` found changed."""
        self.spent: dict[str, float] = {}
        """Seconds of each stage."""
        self._whole: dict[str, Verdicts] = {}

    # Drawing and judging

    def draw_and_judge(self) -> KeptRound:
        """Draw every prompt once, judge it, and pair flagged build samples with rewritten prompts.

        Raises UserError when no pair could be built.
        """
        started = time.monotonic()
        self.draw("generate and judge")
        base = self.verdicts(self.base)
        flagged = base.flagged(BUILD)
        names = [shard.name for shard in self.shards if _is_paired(shard)]
        pairs = sorted(self.run_dir.read(PAIRS, Pair, names), key=lambda pair: pair.sample_id)
        # A trial of a sweep reads pairs that were built at the lowest threshold of all trials.
        self.pairs = [pair for pair in pairs if pair.sample_id in flagged]
        decided = read_rounds(self.run_dir).get(0)
        if decided is None:
            decided = self.commit(self._first_round(base, time.monotonic() - started))
        return KeptRound(decided, self.spec.codebook, base)

    def draw(self, stage: str) -> None:
        """Draw, judge and pair the shards that lack a commit, and read what was drawn."""
        units = [DrawUnit(shard.name, self.base, _is_paired(shard)) for shard in self.shards]
        self._run(stage, unfinished(self.run_dir, units))
        self.samples = self.run_dir.read(TOKENS, Sample, [shard.name for shard in self.shards])

    def judge(
        self, codebooks: Sequence[str], shards: Sequence[Shard], stage: str, reuse_from: str = ""
    ) -> None:
        """Judge shards under each codebook.

        Pictures that are the same under ``reuse_from`` ("": the base) keep its verdicts.
        """
        digests = list(dict.fromkeys(codebooks))
        known = reuse_from or self.base
        units = [JudgeUnit(shard.name, digest, known) for digest in digests for shard in shards]
        self._run(stage, unfinished(self.run_dir, units))
        for digest in digests:
            commits = self.run_dir.committed(verdict_stage(digest))
            counts = [commits[shard.name].counts for shard in shards]
            self.touched[digest] = sum(each.get("touched", 0) for each in counts)

    def judge_held_out(self, number: int, codebook: str, best: KeptRound) -> Verdicts:
        """Judge the held-out pictures, which decide a round, and return the verdicts on them."""
        held_out = self.of(HELD_OUT)
        self.judge([codebook], held_out, f"round {number}: re-judge", best.codebook)
        return self.verdicts(codebook, HELD_OUT)

    def judge_build(self, number: int, codebook: str, best: KeptRound) -> None:
        """Judge the pictures from which the next edit is built."""
        stage = f"round {number}: judge build pictures"
        self.judge([codebook], self.of(BUILD), stage, best.codebook)

    def prepare_next(self, number: int, codebook: str, best: KeptRound) -> None:
        """Judge what the next edit is built from, if another round follows the kept ``number``."""
        if self._judge_ahead and number < self.config.loop.max_rounds:
            self.judge_build(number, codebook, best)

    def verdicts(self, codebook: str, split: str = "") -> Verdicts:
        """Return the verdicts under a codebook on the samples of a split ("": all)."""
        samples = [sample for sample in self.samples if split in ("", sample.split)]
        return read_verdicts(self.run_dir, self.config, codebook, self.base, self.prompts, samples)

    def all_verdicts(self, best: KeptRound) -> Verdicts:
        """Return the verdicts on all pictures; those on build pictures are judged if need be."""
        if best.before is None:
            return best.verdicts
        if best.codebook not in self._whole:
            self.all_verdicts(best.before)  # they hold for the pictures that are the same
            self.judge_build(best.round.round, best.codebook, best.before)
            self._whole[best.codebook] = self.verdicts(best.codebook)
        return self._whole[best.codebook]

    def of(self, split: str) -> list[Shard]:
        """Return the shards of a split."""
        return [shard for shard in self.shards if shard.split == split]

    # Editing and fine-tuning

    def pairs_still_flagged(self, best: KeptRound) -> list[Pair]:
        """Return the pairs whose harmful sample the model still flags under the best codebook.

        With a cumulative basis: all pairs.
        """
        verdicts, pairs = self.all_verdicts(best), self._pairs_under(best.codebook)
        if self.config.edit.basis == "cumulative":
            return pairs
        flagged = verdicts.flagged(BUILD)
        return [pair for pair in pairs if pair.sample_id in flagged]

    def edit(self, config: EditConfig, table: torch.Tensor, pairs: Sequence[Pair]) -> Edit:
        """Return E′, the edit of a table ``[K,d]`` that is built from pairs."""
        return build_edit(
            table,
            torch.tensor([pair.harmful_tokens for pair in pairs]),
            torch.tensor([pair.safe_tokens for pair in pairs]),
            self._benign_tokens(),
            config,
            self.spec.normalised,
            seed=self.config.sampling.seed,
            concepts_of_pair=[pair.concepts for pair in pairs],
        )

    def finetune(self, edit: Edit, best: KeptRound, number: int) -> torch.Tensor:
        """Return the table ``[K,d]`` that round ``number`` tries: E″, the edit with its trained Δ.

        A round after the first goes only ``loop.later_step`` of the way from the best table.
        """
        train = self._train_safe if self.config.finetune.target == "safe" else self._train_pairs
        trained = train(edit, best, number)
        step = 1.0 if number == 1 else self.config.loop.later_step
        return interpolate(best.table, trained, step, self.spec.normalised)

    def publish(self, table: torch.Tensor, number: int, method: str) -> str:
        """Store an edited table as a `SafeCodebook` and return its digest."""
        digest = table_digest(table)
        meta = ArtifactMeta(method, self.spec.family, number)
        artifact = SafeCodebook.from_tables(self.spec.codebook, table, meta)
        self.run_dir.put_blob(codebook_blob(digest), artifact.to_bytes())
        return digest

    # Rounds

    def recorded(self, number: int, best: KeptRound) -> Round | None:
        """Return the decision on a round that stands from an earlier start; None without one.

        Verdicts that were removed since, because they were damaged, are judged again.
        """
        record = read_rounds(self.run_dir).get(number)
        tried = record.tried if record else ""
        if record is None or not has_blob(self.run_dir, codebook_blob(tried or best.codebook)):
            return None
        self.all_verdicts(best)
        if tried:
            self.judge_held_out(number, tried, best)
        return record

    def commit(self, attempt: Round) -> Round:
        """Record a round and return the record that stands: an earlier one if there was any."""
        return Round.from_record(self.run_dir.commit_round(attempt.round, attempt.to_record()))

    def kept(self, attempt: Round, before: KeptRound) -> KeptRound:
        """Return a round that was kept as the best codebook so far."""
        table = read_table(self.run_dir, attempt.codebook, self.spec.codebook)
        return KeptRound(attempt, table, self.verdicts(attempt.codebook, HELD_OUT), before)

    def redrawn(self, codebook: str) -> int:
        """Count the samples that were drawn again under a codebook, where tokens depend on it."""
        commits = self.run_dir.committed(redrawn_stage(codebook))
        return sum(commit.rows for commit in commits.values())

    # The end

    def arms(self) -> dict[str, Arm]:
        """Compare arms on the same tokens: each is built once, from all pairs, at full strength."""
        names = [name for name in self.config.loop.arms if name != "none"]
        if not names:
            return {}
        configs = [EditConfig(method=name, rank=self.config.edit.rank) for name in names]
        edits = [self.edit(config, self.spec.codebook, self.pairs) for config in configs]
        rows = self._safe_tokens_to_keep(self.config.sampling.seed)
        jobs = [DeltaJob(edit.codebook, edit.basis, None) for edit in edits]
        tables = self._train(jobs, rows, "arms: fine-tune")
        digests = [self.publish(table, 0, name) for table, name in zip(tables, names, strict=True)]
        self.judge(digests, self.of(HELD_OUT), "arms: judge")
        return {
            name: Arm(digest, self.verdicts(digest, HELD_OUT).figures())
            for name, digest in zip(names, digests, strict=True)
        }

    def summarize(self, rounds: Sequence[Round], best: KeptRound, arms: dict[str, Arm]) -> Summary:
        """Write `summary.json` and return it."""
        final = self.publish(best.table, best.round.round, self.config.edit.method)
        lost = self._quarantined(rounds, arms)
        degraded = lost.share > self.config.execution.quarantine_share
        model = ModelName(self.config.model.name, self.spec.family, self.spec.weights_digest)
        summary = Summary(
            status="degraded" if degraded else "complete",
            model=model,
            fingerprint=self.run_dir.record["fingerprint"],
            judge_threshold=self.config.judge.threshold,
            rounds=tuple(rounds),
            best_round=best.round.round,
            safe_codebook=codebook_blob(final),
            arms=arms,
            calibration=best.lineage()[0].verdicts.calibration(),
            quarantined=lost,
            alarm=divergence(rounds[0].figures, best.round.figures),
        )
        self.run_dir.write_summary(summary.to_record())
        return summary

    # What they stand on

    def _run(self, stage: str, units: Sequence[DrawUnit | JudgeUnit]) -> None:
        if not units:
            return
        sizes = {shard.name: len(shard.cells) for shard in self.shards}
        pictures = [sizes[unit.shard] for unit in units]
        self.progress.start(stage, sum(pictures), "pictures")
        self.workers.run(units, pictures, self.progress)
        self.spent[stage] = self.progress.finish()

    def _first_round(self, base: Verdicts, seconds: float) -> Round:
        commits = self.run_dir.committed(PAIRS)
        counts: list[Counts] = [commit.counts for commit in commits.values()]
        if not self.pairs:
            flagged = sum(each["flagged"] for each in counts)
            raise UserError(
                "no pair could be built: of the unsafe prompts' pictures the model flags "
                f"{flagged} itself; check judge.questions and judge.rewrite, or give prompts that "
                "this model draws unsafely"
            )
        drawn = len(self.samples) + sum(each["rewritten"] for each in counts)
        return Round(
            round=0,
            kept=True,
            codebook=self.base,
            figures=base.figures(),
            pairs=len(self.pairs),
            sampled=0 if self.run_dir.record.get("shared") else drawn,
            seconds=round(seconds, 1),
        )

    def _pairs_under(self, codebook: str) -> list[Pair]:
        """All pairs, with harmful tokens as they are drawn under a codebook."""
        if codebook == self.base or not self.spec.tokens_depend_on_codebook:
            return self.pairs
        drawn = {s.sample_id: s.tokens for s in self.run_dir.read(redrawn_stage(codebook), Sample)}
        return [
            replace(pair, harmful_tokens=drawn.get(pair.sample_id, pair.harmful_tokens))
            for pair in self.pairs
        ]

    def _benign_tokens(self) -> torch.Tensor:
        """Tokens int64 ``[B,N]`` of the benign build samples."""
        benign = [s for s in self.samples if s.role == BENIGN and s.split == BUILD]
        return torch.tensor([sample.tokens for sample in benign])

    def _train_safe(self, edit: Edit, best: KeptRound, number: int) -> torch.Tensor:
        """Δ in the harmless space: safe tokens are to be drawn as before."""
        local = self.config.edit.method in ("selective", "transport")
        job = DeltaJob(edit.codebook, edit.basis, edit.changed if local else None)
        rows = self._safe_tokens_to_keep(self.config.sampling.seed + number)
        return self._train([job], rows, f"round {number}: fine-tune")[0]

    def _train_pairs(self, edit: Edit, best: KeptRound, number: int) -> torch.Tensor:
        """Δ on the rows that draw harm: harmful tokens are to be drawn as the safe picture."""
        finetune = self.config.finetune
        history = [self.all_verdicts(each) for each in best.lineage()]
        harmful = harmful_rows(history, self._pairs_under(best.codebook))
        keep = safe_rows(history, self.pairs)
        usage = UsageCounts.empty(len(edit.codebook))
        usage.add(
            torch.tensor(harmful.tokens), torch.tensor(harmful.targets), self._benign_tokens()
        )
        movable = usage.harmful >= finetune.min_count
        price = usage.price(self.config.edit.smoothing)
        job = DeltaJob(edit.codebook, None, movable, finetune.loss, price)
        rows = pair_rows(harmful, keep, finetune, self.config.sampling.seed + number)
        return self._train([job], rows, f"round {number}: fine-tune")[0]

    def _safe_tokens_to_keep(self, seed: int) -> np.ndarray:
        safe = np.array([pair.safe_tokens for pair in self.pairs], dtype=np.int32)
        return keep_rows(safe, self.config.finetune, seed)

    def _train(self, jobs: list[DeltaJob], rows: np.ndarray, stage: str) -> list[torch.Tensor]:
        """Each job's E″; without fine-tuning steps its E′ as it is."""
        if self.config.finetune.steps == 0:
            return [job.edited for job in jobs]
        self.progress.start(stage)
        tables = self._train_jobs(jobs, rows)
        self.spent[stage] = self.progress.finish()
        return tables

    def _quarantined(self, rounds: Sequence[Round], arms: dict[str, Arm]) -> Quarantined:
        """Rows of this run's own stages: what an evaluation quarantined is not the run's loss."""
        codebooks = [each.tried or each.codebook for each in rounds]
        codebooks += [arm.codebook for arm in arms.values()]
        stages = [TOKENS, PAIRS]
        for digest in sorted(set(codebooks)):
            stages += [verdict_stage(digest), redrawn_stage(digest)]
        planned = sum(len(shard.cells) for shard in self.shards)
        return Quarantined(**quarantine_summary(self.run_dir, stages, planned))


def _is_paired(shard: Shard) -> bool:
    """Whether pairs are built from a shard."""
    return shard.role == UNSAFE and shard.split == BUILD
