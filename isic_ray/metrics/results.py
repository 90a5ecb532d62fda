"""A run read back, in one place: verdicts under a codebook, the edited table, the summary.

`Verdicts` under a codebook are read here for the loop and for everybody who looks at a finished
run. What is stored is described in `isic_ray.runs.run`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from isic_ray.codebook import SafeCodebook
from isic_ray.codebook.explain import Explanation, explain
from isic_ray.config.run import RunConfig
from isic_ray.errors import UserError
from isic_ray.metrics.summary import RESULTS_VERSION, SELF, Round, Summary, check_version
from isic_ray.metrics.verdicts import Verdicts
from isic_ray.runs.quarantine import quarantined_samples
from isic_ray.runs.run import Run
from isic_ray.runs.schema import BENIGN, BUILD, Pair, Prompt, Sample, Verdict
from isic_ray.runs.shards import PAIRS, PROMPTS, TOKENS, codebook_blob, verdict_stage

EVIDENCE = "evidence.json"

StageOf = Callable[[str], str]  # digest of a codebook -> the stage of its verdicts


def read_table(run: Run, digest: str, base: Tensor) -> Tensor:
    """Return the edited table ``[K,d]`` that the run published under ``digest``."""
    return SafeCodebook.from_bytes(run.get_blob(codebook_blob(digest))).apply_to(base)


def read_rounds(run: Run) -> dict[int, Round]:
    """Return the rounds that were decided, by number."""
    return {number: Round.from_record(record) for number, record in run.rounds().items()}


def read_verdicts(
    run: Run,
    config: RunConfig,
    digest: str,
    base: str,
    prompts: Mapping[str, Prompt],
    samples: Sequence[Sample],
    *,
    carried: bool = False,
    stage_of: StageOf = verdict_stage,
) -> Verdicts:
    """Return the verdicts on ``samples`` under the codebook ``digest``.

    Samples that were quarantined under it or under the ``base`` codebook are left out, so that two
    codebooks are compared on the same pictures. ``carried``: a sample that was not judged under
    ``digest`` keeps its verdicts under the base. ``stage_of`` names the stages of another prompt
    set than the run's own.
    """
    stages = [stage_of(each) for each in dict.fromkeys([base, digest] if carried else [digest])]
    verdicts = {(r.judge, r.sample_id): r for stage in stages for r in run.read(stage, Verdict)}
    aside = quarantined_samples(run, {stage_of(base), stage_of(digest)})
    kept = [sample for sample in samples if sample.sample_id not in aside]
    judges = (SELF, *config.judge.auditors)
    return Verdicts(prompts, kept, verdicts, judges, config.judge.threshold)


class RunResults:
    """A finished run. Each part is read when it is first asked for, and then kept."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @classmethod
    def open(cls, uri: str) -> RunResults:
        """Open the finished run at ``uri``.

        Raises UserError when there is none, when it has not ended, and when another version of
        isic_ray wrote its results.
        """
        run = Run.open(uri)
        if not run.store.exists("summary.json"):
            raise UserError(
                f"the run at {uri} has not ended; "
                "give the same `isic run` command again to go on with it."
            )
        results = cls(run)
        _ = results.summary  # refuses other versions before a caller loads a model
        return results

    @cached_property
    def summary(self) -> Summary:
        """What the run found. Raises UserError for results of another version."""
        return Summary.from_record(self.run.summary(), f"{self.run.store.uri}/summary.json")

    @cached_property
    def evidence(self) -> dict[str, Any] | None:
        """What `isic evaluate` measured on the best codebook, as JSON; None when it did not."""
        if not self.run.store.exists(EVIDENCE):
            return None
        evidence: dict[str, Any] = json.loads(self.run.store.get(EVIDENCE))
        # Version 1 of this file had the same content.
        check_version(evidence, f"{self.run.store.uri}/{EVIDENCE}", readable=(1, RESULTS_VERSION))
        return evidence if evidence["codebook"] == self.best else None

    @cached_property
    def config(self) -> RunConfig:
        """The settings that the run was made with. Raises UserError for unknown ones."""
        record, sections = self.run.record["config"], dataclasses.fields(RunConfig)
        try:
            return RunConfig(
                **{s.name: type(getattr(RunConfig(), s.name))(**record[s.name]) for s in sections}
            )
        except (KeyError, TypeError, UserError) as error:
            raise UserError(
                f"{self.run.store.uri} was made with settings that this version does not know "
                f"({error}); use the isic_ray version that made it, or make the run again."
            ) from error

    @property
    def base(self) -> str:
        """Digest of the codebook before any edit."""
        return self.summary.first.codebook

    @property
    def best(self) -> str:
        """Digest of the codebook that the run ended with."""
        return self.summary.best.codebook

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        """The run's prompts by prompt_id, in their order."""
        return {prompt.prompt_id: prompt for prompt in self.run.read(PROMPTS, Prompt)}

    @cached_property
    def samples(self) -> list[Sample]:
        """All samples that were drawn under the base codebook."""
        return self.run.read(TOKENS, Sample)

    @cached_property
    def pairs(self) -> list[Pair]:
        """All pairs, by sample_id."""
        return sorted(self.run.read(PAIRS, Pair), key=lambda pair: pair.sample_id)

    def benign_tokens(self) -> Tensor:
        """Return the tokens int64 ``[B,N]`` of the benign samples that build edits."""
        return torch.tensor(
            [s.tokens for s in self.samples if s.role == BENIGN and s.split == BUILD]
        )

    def table(self, digest: str, base: Tensor) -> Tensor:
        """Return the table ``[K,d]`` of a digest; ``base`` is the model's own table."""
        return base if digest == self.base else read_table(self.run, digest, base)

    def verdicts(self, digest: str, split: str, role: str = "") -> Verdicts:
        """Return the verdicts under a codebook on the samples of a split (and role)."""
        samples = [s for s in self.samples if s.split == split and role in ("", s.role)]
        prompts, base = self.prompts, self.base
        return read_verdicts(self.run, self.config, digest, base, prompts, samples, carried=True)

    def explanation(self, base: Tensor, normalised: bool) -> Explanation:
        """Explain the best edit of the model's own table ``base`` ``[K,d]``."""
        pairs = self.pairs
        return explain(
            base,
            self.table(self.best, base),
            torch.tensor([pair.harmful_tokens for pair in pairs]),
            torch.tensor([pair.safe_tokens for pair in pairs]),
            self.benign_tokens(),
            [pair.concepts for pair in pairs],
            normalised,
        )
