"""One trial of a sweep: the loop on pictures that another run drew, with workers that all trials
share.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

from isic_ray.config.run import RunConfig
from isic_ray.execution.pool import ActorPool, Unit
from isic_ray.execution.progress import Progress
from isic_ray.execution.training_queue import TrainingGroups
from isic_ray.metrics.verdicts import SELF, is_unsafe
from isic_ray.models.registry import read_spec
from isic_ray.runs.run import Run, fingerprint
from isic_ray.runs.schema import HELD_OUT, Prompt, Verdict
from isic_ray.runs.shards import PROMPTS, verdict_stage
from isic_ray.workflows.loop import IsicLoop, KeptRound, create_run
from isic_ray.workflows.steps import Record

Report = Callable[[Record], None]
Workers = tuple[ActorPool, TrainingGroups]  # that draw and judge, and that train


def trial_uri(sweep: str, config: RunConfig) -> str:
    """Where a trial lies: the same settings are the same trial."""
    return f"{sweep}/trials/{fingerprint(config)[:16]}"


class Trial(IsicLoop):
    """`IsicLoop` whose data are those of the sweep's shared run.

    ``report`` gets `outcome` after every round but the last, before the next begins; a scheduler
    may end the trial there. ``threshold`` is the one at which all trials are compared, whatever
    their own.
    """

    def __init__(
        self, config: RunConfig, sweep: str, workers: Workers, threshold: float, report: Report
    ) -> None:
        shared = Run.open(f"{sweep}/shared")
        prompts, facts = shared.read(PROMPTS, Prompt), read_spec(config.model)
        plan = {"plan": shared.record["plan"], "shared": shared.store.uri}
        run = create_run(config, trial_uri(sweep, config), prompts, facts, plan)
        super().__init__(config, run, prompts, facts, Progress(io.StringIO()))
        self.shared_crew, self.trainers = workers
        self.threshold, self.report = threshold, report

    def outcome(self, number: int, digest: str) -> Record:
        """Held-out figures of a codebook at the sweep's threshold, as plain numbers."""
        figures = replace(self.evidence(digest, HELD_OUT), threshold=self.threshold).figures()
        audit = {
            f"audit_{role}": figures[role].get("audit", {}).get("rate")
            for role in ("unsafe", "benign")
        }
        own = {role: figures[role]["self"]["rate"] for role in ("unsafe", "benign")}
        return {
            "rounds": number,
            "codebook": digest,
            **own,
            **audit,
            "psnr": figures["benign"]["psnr"],
        }

    def run(self) -> Record:
        """Its workers are not its own, and live on."""
        return self.improve()

    def run_to_end(self) -> Record:
        """`run`; returns the `outcome` of the codebook that it ends with."""
        summary = self.run()
        rounds = summary["rounds"]
        return self.outcome(rounds[-1]["round"], rounds[summary["best_round"]]["codebook"])

    def generate(self) -> Record:
        """Round 0 is the shared run's."""
        self.load()
        drawn = Run.open(self.run_dir.record["shared"]).rounds()[0]
        return self.run_dir.commit_round(
            0, {**drawn, "sampled": 0, **self.evidence(self.base_digest).figures()}
        )

    def load(self) -> None:
        """Pairs only of pictures that this trial's own threshold flags."""
        super().load()
        rows = self.run_dir.read(verdict_stage(self.base_digest), Verdict)
        flagged = {
            row.sample_id
            for row in rows
            if row.judge == SELF and is_unsafe(row, self.config.judge.threshold)
        }
        self.pairs = [pair for pair in self.pairs if pair.sample_id in flagged]

    def round(self, number: int, best: KeptRound) -> Record:
        if number > 1:
            self.report(self.outcome(number - 1, best.digest))
        return super().round(number, best)

    def another_follows(self, number: int) -> bool:
        """The scheduler may end it here, so what another round needs is judged when it begins."""
        return False

    def work(self, stage: str, units: list[Unit]) -> list[Record]:
        answers = self.shared_crew.map([{"unit": [json.dumps(unit)]} for unit in units])
        return [json.loads(answer["result"][0]) for answer in answers]
