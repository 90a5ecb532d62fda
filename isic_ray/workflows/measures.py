"""The figures of `isic evaluate`: what it makes of the rows that it committed, as JSON objects.

Arms, challenges and attacks stand beside the run's own figures, under the same keys as in
summary.json.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from isic_ray.errors import UserError
from isic_ray.metrics.fidelity import PSNR_CAP
from isic_ray.metrics.results import RunResults, read_verdicts
from isic_ray.metrics.statistics import agreement, mean, mean_estimate, rate, rogan_gladen
from isic_ray.metrics.summary import AUDIT, SELF, Rates, rates_to_record
from isic_ray.metrics.verdicts import Verdicts, divergence, flag_threshold
from isic_ray.models.base import ModelSpec
from isic_ray.runs.schema import BENIGN, HELD_OUT, UNSAFE, Attack, Fidelity, Sample
from isic_ray.runs.shards import TOKENS
from isic_ray.workflows.attacks import SEEDS, WORDS, Budget
from isic_ray.workflows.challenges import FRESH, Challenge
from isic_ray.workflows.evaluation_units import (
    attack_stage,
    fidelity_stage,
    in_set,
    recovered_blob,
    verdicts_in_set,
)

Record = dict[str, Any]  # a JSON object of evidence.json


@dataclass(frozen=True)
class Plan:
    """What to measure. Numbers of 0 leave a part out."""

    limit: int = 300
    """Prompts of each challenge."""
    unsafe_files: tuple[str, ...] = ()
    """More prompts, all of them held out."""
    benign_files: tuple[str, ...] = ()
    negative: str = ""
    """Negative prompt; "": the words that the run's rewrites took out."""
    negative_scale: float = 4.0
    attacked: int = 32
    """Held-out prompts that the searches start from."""
    budget: Budget = field(default_factory=Budget)
    recovery_pictures: int = 64
    """Unsafe pictures that the recovery attack has."""
    recovery_steps: tuple[int, ...] = (10, 40)


class Measures:
    """One evaluation of a run: what it reads, and the figures that it makes of it."""

    def __init__(self, results: RunResults, spec: ModelSpec, plan: Plan) -> None:
        self.results, self.spec, self.plan = results, spec, plan
        if spec.weights_digest != results.run.record["model_digest"]:
            raise UserError(
                "the model's weights are not those that the run was made with; give the same "
                "checkpoint"
            )
        if spec.tokens_depend_on_codebook:
            raise UserError(
                f"the family {spec.family} draws other tokens after an edit: not supported"
            )

    def verdicts(
        self, codebook: str, challenge: Challenge | None = None, concept: str = "", role: str = ""
    ) -> Verdicts:
        """Return the verdicts under a codebook on a challenge (None: the run's held-out prompts).

        With a ``concept`` or a ``role``, on the samples of its prompts alone.
        """
        if challenge is None:
            return self.results.verdicts(codebook, HELD_OUT, role)
        prompts = {prompt.prompt_id: prompt for prompt in challenge.prompts}
        samples = [
            sample
            for sample in self.results.run.read(in_set(TOKENS, challenge.key), Sample)
            if not concept or concept in prompts[sample.prompt_id].concepts
        ]
        return read_verdicts(
            self.results.run,
            self.results.config,
            codebook,
            self.results.base,
            prompts,
            samples,
            carried=True,
            stage_of=verdicts_in_set(challenge.key),
        )

    def arms(self, edits: dict[str, str], inputs: Iterable[Challenge]) -> Record:
        """Return every arm on the run's held-out prompts, and how it differs from no edit."""
        results = self.results
        base = self.verdicts(results.base)
        digests = {"no edit": results.base, **edits}
        digests |= {f"{name} + Δ": arm.codebook for name, arm in results.summary.arms.items()}
        digests["this run"] = results.best
        found: Record = {}
        for name, digest in digests.items():
            verdicts = self.verdicts(digest)
            figures = verdicts.figures().to_record()
            found[name] = {"kind": "edit", "codebook": digest, **figures}
            found[name]["against"] = verdicts.compared_to(base).to_record()
        for one in inputs:
            verdicts = self.verdicts(results.base, one)
            found[one.name] = {"kind": "input", **verdicts.figures().to_record()}
            found[one.name]["benign"]["psnr"] = None  # another picture, not the same one changed
            found[one.name]["against"] = verdicts.compared_to(base).to_record()
        return found

    def challenges(self, challenges: Iterable[Challenge]) -> Record:
        """Return the figures of each challenge before and after the run's edit."""
        found = {}
        for one in challenges:
            base = self.verdicts(self.results.base, one)
            best = self.verdicts(self.results.best, one)
            found[one.name] = {
                "role": one.prompts[0].role if one.prompts else "",
                "before": _main_rates(base),
                "after": _main_rates(best),
                "against": best.compared_to(base).to_record(),
                "kinds": _kinds(base, best),
            }
        return found

    def concepts(
        self, challenges: Iterable[Challenge], edits: dict[str, str], without: dict[str, str]
    ) -> Record:
        """Return, by concept, what an edit that never saw the concept does to fresh scenes of it.

        Beside no edit, and the same edit built from all pairs.
        """
        fresh = next((one for one in challenges if one.name == FRESH), None)
        found: Record = {}
        for concept, digest in without.items() if fresh else ():
            arms = {
                "no edit": self.results.base,
                "never saw it": digest,
                "saw it": edits["transport"],
            }
            found[concept] = {
                name: rates_to_record(self.verdicts(arm, fresh, concept).figures().unsafe)
                for name, arm in arms.items()
            }
        return found

    def attacks(self) -> Record:
        """Return the share of attacked prompts with an unsafe picture, before and after a search.

        By what the search varies.
        """
        plan, threshold = self.plan, self.results.config.judge.threshold
        found: Record = {}
        for vary in (WORDS, SEEDS) if plan.attacked else ():
            stage = attack_stage(self.results.best, vary, plan.budget, plan.attacked)
            rows = self.results.run.read(stage, Attack)
            found[vary] = {"queries": mean([row.queries for row in rows])}
            for index, name in enumerate(rows[0].judges if rows else ()):
                limit = flag_threshold(name, threshold)
                first = rate([row.first[index] >= limit for row in rows])
                worst = rate([row.worst[index] >= limit for row in rows])
                key = {0: SELF, 1: AUDIT}.get(index, name)
                found[vary][key] = {"before": first.to_dict(), "after": worst.to_dict()}
        return found

    def recovery(self, recovered: dict[str, str]) -> Record:
        """Return the unsafe rates under each table that a recovery attack ended with."""
        results = self.results
        tables = {"original table": results.base, "edited table": results.best, **recovered}
        return {
            name: rates_to_record(self.verdicts(digest, role=UNSAFE).figures().unsafe)
            for name, digest in tables.items()
        }

    def recovered(self) -> dict[str, str]:
        """Return the tables that the recovery attacks ended with, by their steps."""
        count = self.plan.recovery_pictures
        blobs = {
            f"after {steps} steps": recovered_blob(self.results.best, steps, count)
            for steps in self.plan.recovery_steps
            if count
        }
        return {name: self.results.run.get_blob(blob).decode() for name, blob in blobs.items()}

    def quality(self) -> Record:
        """Return what benign held-out pictures lose: fidelity, and near-neighbours that survive."""
        rows = self.results.run.read(fidelity_stage(self.results.best), Fidelity)
        base, best = self.verdicts(self.results.base), self.verdicts(self.results.best)
        found = [best.verdicts[SELF, s.sample_id].psnr for s in best.select(BENIGN, HELD_OUT)]
        psnr = [PSNR_CAP if value is None else value for value in found]  # None: no changed row
        return {
            "psnr_per_picture": mean_estimate(psnr).to_dict(),
            "ssim": mean_estimate([row.ssim for row in rows]).to_dict(),
            "gmsd": mean_estimate([row.gmsd for row in rows]).to_dict(),
            "kinds": _kinds(base, best),
        }

    def judges(self, challenges: Iterable[Challenge]) -> Record:
        """Return how far the self-judge can be trusted, and its rate as the auditor would count it.

        Its errors are measured on the challenges: other pictures than those of the corrected rate.
        """
        sets = list(challenges)
        found: Record = {}
        for name, digest in (("before", self.results.base), ("after", self.results.best)):
            own = self.verdicts(digest)
            calibration = {key: each.to_dict() for key, each in own.calibration().items()}
            found[name] = {"calibration": calibration}
            if len(own.judges) > 1 and sets:
                found[name] |= self._corrected(own, [self.verdicts(digest, one) for one in sets])
        return found

    def alarm(self) -> str | None:
        """Return the sentence that the run's own figures raise, if any."""
        base, best = self.verdicts(self.results.base), self.verdicts(self.results.best)
        return divergence(base.figures(), best.figures())

    def _corrected(self, own: Verdicts, others: list[Verdicts]) -> Record:
        auditor = own.judges[1]
        said = [flag for each in others for flag in each.unsafe(SELF, each.samples)]
        truth = [flag for each in others for flag in each.unsafe(auditor, each.samples)]
        errors = agreement(said, truth)
        unsafe = own.select(UNSAFE, HELD_OUT)
        raw = rate(own.unsafe(SELF, unsafe))
        corrected = rogan_gladen(raw, errors.sensitivity, errors.specificity)
        return {
            "on_challenges": errors.to_dict(),
            "self_raw": raw.to_dict(),
            "self_corrected": corrected.to_dict(),
            "audit": rate(own.unsafe(auditor, unsafe)).to_dict(),
        }


def _main_rates(verdicts: Verdicts) -> Record:
    figures = verdicts.figures().to_record()
    return {"unsafe": figures["unsafe"], "benign": figures["benign"]}


def _kinds(base: Verdicts, best: Verdicts) -> Record:
    def record(kinds: dict[str, Rates]) -> Record:
        return {judge: rates_to_record(rates) for judge, rates in kinds.items()}

    return {"before": record(base.kinds()), "after": record(best.kinds())}
