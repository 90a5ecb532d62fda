"""The ISIC loop. `IsicLoop.improve` reads like the paper's algorithm; every step is committed,
so runs can resume.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from isic_ray.codebook import Edit
from isic_ray.codebook.edit import interpolate
from isic_ray.codebook.usage import UsageCounts
from isic_ray.config.run import EditConfig, RunConfig
from isic_ray.errors import UserError
from isic_ray.execution.progress import Progress
from isic_ray.execution.session import check_nodes, ray_session
from isic_ray.execution.training import DeltaJob, has_blob
from isic_ray.metrics import statistics
from isic_ray.metrics.verdicts import SELF, Verdicts, divergence
from isic_ray.models.base import ModelSpec
from isic_ray.models.registry import digest_judge, read_spec
from isic_ray.prompts.sets import load_prompts, prompts_digest
from isic_ray.runs.quarantine import quarantine_summary
from isic_ray.runs.run import Run, fingerprint
from isic_ray.runs.schema import BENIGN, BUILD, HELD_OUT, UNSAFE, Pair, Prompt
from isic_ray.runs.shards import PAIRS, PROMPTS, TOKENS, codebook_blob, redrawn_stage, verdict_stage
from isic_ray.workflows.steps import Record, Stages
from isic_ray.workflows.training_rows import harmful_rows, keep_rows, pair_rows, safe_rows


def run_isic(config: RunConfig, out: str, verbose: bool = False) -> Record:
    """Run (or go on with) the whole method; artifacts and `summary.json` lie at ``out``. Returns
    the summary.

    Raises UserError for bad input, and when ``out`` holds a run with other settings.
    """
    prompts = load_prompts(config.prompts)
    facts = read_spec(config.model)
    run = create_run(config, out, prompts, facts)
    progress = Progress(watch=run.write_progress)
    with ray_session(config.execution, verbose):
        check_nodes(run.store.uri)
        return IsicLoop(config, run, prompts, facts, progress).run()


def create_run(
    config: RunConfig,
    out: str,
    prompts: list[Prompt],
    facts: ModelSpec,
    more: Record | None = None,
) -> Run:
    """The run at ``out``, created or resumed, with its prompts committed; ``more`` goes into its
    record.
    """
    run = Run.create_or_resume(
        out,
        {
            "config": asdict(config),
            "fingerprint": fingerprint(config),
            "model_digest": facts.weights_digest,
            "judge_digest": digest_judge(config.judge.model),
            "prompts_digest": prompts_digest(prompts),
            "plan": {"shard_size": config.execution.shard_size, "prompts": len(prompts)},
            **(more or {}),
        },
    )
    run.commit(PROMPTS, "all", prompts, Prompt)
    return run


@dataclass
class KeptRound:
    """The best codebook so far: its table, its round, its evidence, and the best before it (None:
    it is the base).

    Of a kept round's codebook the evidence is on held-out pictures alone, until
    `IsicLoop.complete`.
    """

    round: int
    table: torch.Tensor
    digest: str
    evidence: Verdicts
    before: KeptRound | None = None
    whole: bool = False

    def lineage(self) -> list[KeptRound]:
        """From the base codebook to this one."""
        return [*(self.before.lineage() if self.before else []), self]


class IsicLoop(Stages):
    """What is decided when; every decision is committed, so that a run that is started again
    goes on from it.
    """

    def run(self) -> Record:
        """`improve`, with workers that live no longer than that. Returns the summary."""
        try:
            with self.trainers:
                return self.improve()
        finally:
            if self.crew:
                self.crew.close()

    def improve(self) -> Record:
        """Generate and judge; then edit, fine-tune, re-judge and keep or roll back, until no
        round improves.
        """
        first = self.generate()
        best = KeptRound(0, self.facts.codebook, self.base_digest, self.evidence(self.base_digest))
        rounds = [first]
        for number in range(1, self.config.loop.max_rounds + 1):
            record = self.run_dir.rounds().get(number)
            if record is None or not has_blob(
                self.run_dir, codebook_blob(record.get("tried", best.digest))
            ):
                record = self.run_dir.commit_round(
                    number, self.round(number, best)
                )  # an earlier decision stands
            rounds.append(record)
            self.complete(
                best
            )  # here and next: also verdicts that were removed since, because they were damaged
            if "tried" in record:
                self.judge(
                    [record["tried"]], self.of(HELD_OUT), f"round {number}: re-judge", best.digest
                )
            if not record["kept"]:
                break
            digest = record["codebook"]
            best = KeptRound(
                number, self.table(digest), digest, self.evidence(digest, HELD_OUT), best
            )
        arms = self.arms()
        return self.finish(rounds, best, arms)

    def generate(self) -> Record:
        """Draw every prompt once, judge it, and pair each flagged build sample with its
        rewritten prompt's sample.
        """
        started = time.monotonic()
        if pending := self.pending():
            self.work(
                "generate and judge",
                [{"do": "draw", "shard": name, "codebook": ""} for name in pending],
            )
        self.load()
        if done := self.run_dir.rounds().get(0):
            return done
        counts = [commit.counts for commit in self.run_dir.committed(PAIRS).values()]
        if not self.pairs:
            flagged = sum(c["flagged"] for c in counts)
            raise UserError(
                f"no pair could be built: of the unsafe prompts' pictures the model flags {flagged} itself; "
                "check judge.questions and judge.rewrite, or give prompts that this model draws unsafely"
            )
        return self.run_dir.commit_round(
            0,
            {
                "round": 0,
                "kept": True,
                "codebook": self.base_digest,
                "seconds": round(time.monotonic() - started, 1),
                "sampled": len(self.samples) + sum(c["rewritten"] for c in counts),
                "pairs": len(self.pairs),
                **self.evidence(self.base_digest).figures(),
            },
        )

    def round(self, number: int, best: KeptRound) -> Record:
        """Edit, fine-tune, re-judge and decide; a failed try is repeated once with a weaker edit,
        then rolled back.

        Only held-out pictures decide, so only they are judged; the others are where another round
        follows.
        """
        started = time.monotonic()
        pairs = self.still_flagged(best)
        record: Record = {
            "round": number,
            "kept": False,
            "codebook": best.digest,
            "sampled": 0,
            "pairs": len(pairs),
        }
        strengths = [self.config.edit.strength]
        if self.config.loop.backoff > 0:
            strengths.append(self.config.edit.strength * self.config.loop.backoff)
        for strength in strengths if pairs else []:
            edit = self.edit(replace(self.config.edit, strength=strength), best.table, pairs)
            step = 1.0 if number == 1 else self.config.loop.later_step
            table = interpolate(
                best.table, self.finetune(edit, best, number), step, self.facts.normalised
            )
            if torch.equal(table, best.table):
                record["note"] = "no row passes the thresholds"
                break
            digest = self.publish(table, number, self.config.edit.method)
            self.judge([digest], self.of(HELD_OUT), f"round {number}: re-judge", known=best.digest)
            record |= self.decide(number, best, digest)
            record |= {
                "strength": strength,
                "rows": int((table != self.facts.codebook).any(1).sum()),
            }
            record |= {
                "rank": 0 if edit.basis is None else edit.basis.shape[1],
                "touched": self.touched.get(digest, 0),
            }
            if record["kept"] and self.another_follows(number):
                self.judge_build(digest, number, best.digest)
            record["sampled"] += sum(
                c.rows for c in self.run_dir.committed(redrawn_stage(digest)).values()
            )
            if record["kept"]:
                break
        if not pairs:
            record |= {
                "note": "the model flags none of its own pictures any more",
                **best.evidence.figures(),
            }
        elif "unsafe" not in record:
            record |= best.evidence.figures()
        own = f"round {number}: "
        record["spent"] = {
            k.removeprefix(own): round(v, 1) for k, v in self.spent.items() if k.startswith(own)
        }
        return {**record, "seconds": round(time.monotonic() - started, 1)}

    def still_flagged(self, best: KeptRound) -> list[Pair]:
        """The pairs whose harmful sample the model still flags under the best codebook (all,
        with cumulative basis).
        """
        evidence = self.complete(best)
        pairs = self.pairs_under(best.digest)
        if self.config.edit.basis == "cumulative":
            return pairs
        build = evidence.select(UNSAFE, BUILD)
        flags = evidence.unsafe(SELF, build)
        flagged = {sample.sample_id for sample, flag in zip(build, flags, strict=True) if flag}
        return [pair for pair in pairs if pair.sample_id in flagged]

    def another_follows(self, number: int) -> bool:
        """Whether there is a further round once this one is kept."""
        return number < self.config.loop.max_rounds

    def judge_build(self, digest: str, number: int, known: str) -> None:
        """Verdicts on the pictures from which the next edit is built."""
        self.judge([digest], self.of(BUILD), f"round {number}: judge build pictures", known)

    def complete(self, best: KeptRound) -> Verdicts:
        """The evidence on all pictures: a round was kept by the held-out ones alone, the next
        edit needs the others.
        """
        if best.before and not best.whole:
            self.complete(best.before)  # whose verdicts hold for the pictures that are the same
            self.judge_build(best.digest, best.round, best.before.digest)
            best.evidence, best.whole = self.evidence(best.digest), True
        return best.evidence

    def pairs_under(self, digest: str) -> list[Pair]:
        """All pairs, with the harmful tokens that are drawn under a codebook where tokens depend
        on it.
        """
        drawn = {sample.sample_id: sample.tokens for sample in self.redrawn(digest)}
        return [
            replace(pair, harmful_tokens=drawn.get(pair.sample_id, pair.harmful_tokens))
            for pair in self.pairs
        ]

    def finetune(self, edit: Edit, best: KeptRound, number: int) -> torch.Tensor:
        """E″: the edit with its Δ. Target "safe" keeps to the harmless space; "pair" prefers
        rows that draw harm.
        """
        stage, finetune = f"round {number}: fine-tune", self.config.finetune
        seed = self.config.sampling.seed + number
        if finetune.target == "safe":
            safe = np.array([pair.safe_tokens for pair in self.pairs], dtype=np.int32)
            local = self.config.edit.method in ("selective", "transport")
            job = DeltaJob(edit.codebook, edit.basis, edit.changed if local else None)
            return self.train([job], keep_rows(safe, finetune, seed), stage)[0]
        history = [self.complete(each) for each in best.lineage()]
        harmful, keep = (
            harmful_rows(history, self.pairs_under(best.digest)),
            safe_rows(history, self.pairs),
        )
        usage = UsageCounts.empty(len(edit.codebook))
        usage.add(torch.tensor(harmful.tokens), torch.tensor(harmful.targets), self.benign_tokens())
        price = usage.price(self.config.edit.smoothing)
        job = DeltaJob(
            edit.codebook, None, usage.harmful >= finetune.min_count, finetune.loss, price
        )
        return self.train([job], pair_rows(harmful, keep, finetune, seed), stage)[0]

    def decide(self, number: int, best: KeptRound, digest: str) -> Record:
        """Keep an edit that the self-judge finds safer on held-out prompts and sparing to benign
        ones (no auditors).
        """
        after, limits = self.evidence(digest, HELD_OUT), self.config.loop
        judged = {sample.sample_id for sample in best.evidence.samples}
        held_out = [
            sample for sample in after.select(UNSAFE, HELD_OUT) if sample.sample_id in judged
        ]
        benign = after.select(BENIGN, HELD_OUT)
        test = statistics.paired_improvement(
            np.array(best.evidence.unsafe(SELF, held_out)), np.array(after.unsafe(SELF, held_out))
        )
        level = statistics.level_for_round(
            limits.significance,
            number,
            limits.max_rounds,
            tests_per_round=2 if limits.backoff > 0 else 1,
        )
        base = self.evidence(self.base_digest)
        loss = np.mean(base.shows_what_was_asked(SELF, benign)) - np.mean(
            after.shows_what_was_asked(SELF, benign)
        )
        safer, intact = test.improved(level), bool(loss <= limits.max_benign_loss)
        note = "" if safer else "no significant improvement"
        if not intact:
            note = f"benign alignment falls by {loss:.3f}, more than loop.max_benign_loss"
        kept = safer and intact
        return {
            "kept": kept,
            "codebook": digest if kept else best.digest,
            "tried": digest,
            "note": note,
            "test": test.to_dict(),
            **after.figures(),
        }

    def arms(self) -> Record:
        """The arms that are compared on the same tokens: each built once, from all pairs, at the
        run's strength.
        """
        names = [name for name in self.config.loop.arms if name != "none"]
        if not names:
            return {}
        rank = self.config.edit.rank
        edits = [
            self.edit(EditConfig(method=name, rank=rank), self.facts.codebook, self.pairs)
            for name in names
        ]
        safe = np.array([pair.safe_tokens for pair in self.pairs], dtype=np.int32)
        rows = keep_rows(safe, self.config.finetune, self.config.sampling.seed)
        tables = self.train(
            [DeltaJob(edit.codebook, edit.basis, None) for edit in edits], rows, "arms: fine-tune"
        )
        digests = [self.publish(table, 0, name) for table, name in zip(tables, names, strict=True)]
        self.judge(digests, self.of(HELD_OUT), "arms: judge")
        return {
            name: {"codebook": digest, **self.evidence(digest, HELD_OUT).figures()}
            for name, digest in zip(names, digests, strict=True)
        }

    def quarantined(self, rounds: list[Record], arms: Record) -> Record:
        """Count the rows that this run's own stages set aside: what an evaluation set aside is
        not the run's loss.
        """
        judged: list[str] = [entry["tried" if "tried" in entry else "codebook"] for entry in rounds]
        judged += [arm["codebook"] for arm in arms.values()]
        stages = [TOKENS, PAIRS]
        for digest in sorted(set(judged)):
            stages += [verdict_stage(digest), redrawn_stage(digest)]
        return quarantine_summary(
            self.run_dir, stages, sum(len(shard.cells) for shard in self.shards)
        )

    def finish(self, rounds: list[Record], best: KeptRound, arms: Record) -> Record:
        """Write summary.json; returns it."""
        final = self.publish(best.table, best.round, self.config.edit.method)
        lost = self.quarantined(rounds, arms)
        summary = {
            "schema": 1,
            "status": "degraded"
            if lost["share"] > self.config.execution.quarantine_share
            else "complete",
            "model": {
                "name": self.config.model.name,
                "family": self.facts.family,
                "digest": self.facts.weights_digest,
            },
            "fingerprint": self.run_dir.record["fingerprint"],
            "judge_threshold": self.config.judge.threshold,
            "rounds": rounds,
            "best_round": best.round,
            "safe_codebook": codebook_blob(final),
            "arms": arms,
            "calibration": self.calibration(),
            "quarantined": lost,
            "alarm": divergence(rounds[0], rounds[best.round]),
        }
        return self.run_dir.write_summary(summary)


def generate(config: RunConfig, out: str, verbose: bool = False) -> Record:
    """Draw, judge and pair every prompt of ``config`` into the run at ``out``; returns the
    record of round 0.
    """
    prompts, facts = load_prompts(config.prompts), read_spec(config.model)
    run = create_run(config, out, prompts, facts)
    with ray_session(config.execution, verbose):
        return IsicLoop(config, run, prompts, facts, Progress()).generate()
