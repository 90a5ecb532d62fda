"""Rows that fail, or kill their worker, are quarantined and counted; all others are as if they had
never been there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isic_ray.cli.run import _quarantine_note
from isic_ray.config.run import RunConfig
from isic_ray.errors import UserError
from isic_ray.models.base import ModelSpec
from isic_ray.prompts.sets import load_prompts
from isic_ray.report.numbers import table
from isic_ray.runs.quarantine import PLAIN_TRIES, ROW_DEATHS, DeviceLost
from isic_ray.runs.run import Run
from isic_ray.runs.schema import Sample, Verdict
from isic_ray.runs.shards import PAIRS, TOKENS, verdict_stage
from isic_ray.workflows import worker as shard_worker
from isic_ray.workflows.loop import create_run
from isic_ray.workflows.worker import ShardWorker
from tests.faults.inline import Remembering, drive
from tests.faults.killing import forked
from tests.faults.small import SMALL

SHARD = "unsafe-build-0000"
Bad = Callable[[str], None]


class Failing:
    """The model, with a fault for one prompt in ``sample`` or for its picture in ``judge``."""

    def __init__(
        self, inner: Any, text: str, sample: Bad | None = None, judge: float | None = None
    ) -> None:
        self.inner, self.text, self.bad_sample, self.bad_score = inner, text, sample, judge
        self.seen: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], settings: Any) -> Any:
        if self.bad_sample and self.text in prompts:
            self.bad_sample(self.text)
        tokens = self.inner.sample(prompts, seeds, settings)
        self.seen += [
            self.inner.decode(tokens[i : i + 1]).tobytes()
            for i, p in enumerate(prompts)
            if p == self.text
        ]
        return tokens

    def judge(self, images: np.ndarray, questions: Sequence[str]) -> torch.Tensor:
        scores: torch.Tensor = self.inner.judge(images, questions).clone()
        if self.bad_score is not None:
            scores[[self.is_bad(image) for image in images]] = self.bad_score
        return scores

    def judge_each(
        self, images: np.ndarray, questions: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        answers: list[list[float]] = self.inner.judge_each(images, questions)
        if self.bad_score is None:
            return answers
        bad = self.bad_score
        return [
            [bad] * len(row) if self.is_bad(i) else row
            for i, row in zip(images, answers, strict=True)
        ]

    def is_bad(self, image: np.ndarray) -> bool:
        return image[None].tobytes() in self.seen


@pytest.fixture
def run(tmp_path: Path, facts: ModelSpec) -> Run:
    return create_run(SMALL, str(tmp_path / "run"), load_prompts(SMALL.prompts), facts)


def victim(run: Run) -> str:
    """The text of the first prompt of `SHARD`."""
    return next(
        p.text for p in load_prompts(SMALL.prompts) if p.role == "unsafe" and p.split == "build"
    )


@pytest.fixture
def failing(
    monkeypatch: pytest.MonkeyPatch, remembering: Remembering, run: Run
) -> Callable[..., Failing]:
    def make(**faults: Any) -> Failing:
        model = Failing(remembering, victim(run), **faults)
        monkeypatch.setattr(shard_worker, "load_generator_and_judge", lambda *_: (model, model))
        return model

    return make


def fail(error: Exception) -> Bad:
    def bad(_: str) -> None:
        raise error

    return bad


def healthy_rows(finished: Path, stage: str, shard: str, kind: type) -> list[Any]:
    return Run.open(str(finished)).read_shard(stage, shard, kind)


def test_a_row_that_fails_is_set_aside_and_its_neighbour_is_as_ever(
    run: Run, finished: Path, failing: Callable[..., Failing]
) -> None:
    failing(sample=fail(ValueError("boom\nin two lines")))
    worker = ShardWorker(SMALL, run.store.uri)
    assert worker.draw_shard(SHARD)["samples"] == 2
    (row,) = run.quarantined()
    assert row["stage"] == TOKENS
    assert row["error"] == "ValueError: boom in two lines"
    good = [
        s for s in healthy_rows(finished, TOKENS, SHARD, Sample) if s.sample_id != row["sample_id"]
    ]
    assert run.read_shard(TOKENS, SHARD, Sample) == good
    assert run.committed(TOKENS)[SHARD].counts["quarantined"] == 1
    assert run.store.list("attempts") == []
    assert run.verify() == []


def test_an_answer_that_is_no_number_is_set_aside(
    run: Run, finished: Path, failing: Callable[..., Failing]
) -> None:
    failing(judge=float("nan"))
    worker = ShardWorker(SMALL, run.store.uri)
    worker.draw_shard(SHARD)
    stage = verdict_stage(worker.base_digest)
    (row,) = run.quarantined()
    assert row["stage"] == stage
    assert "no readable answer" in row["error"]
    good = [
        v for v in healthy_rows(finished, stage, SHARD, Verdict) if v.sample_id != row["sample_id"]
    ]
    assert run.read_shard(stage, SHARD, Verdict) == good
    assert len(run.read_shard(TOKENS, SHARD, Sample)) == 3
    assert run.committed(PAIRS)[SHARD].counts["flagged"] <= 2


def test_a_row_that_kills_its_worker_each_time_is_found(
    run: Run, finished: Path, failing: Callable[..., Failing]
) -> None:
    failing(sample=lambda _: os._exit(7))
    deaths = 0
    while forked(lambda: ShardWorker(SMALL, run.store.uri).draw_shard(SHARD) and None) == 7:
        deaths += 1
        assert deaths <= PLAIN_TRIES + ROW_DEATHS
    assert deaths == PLAIN_TRIES + ROW_DEATHS
    (row,) = run.quarantined()
    assert row["error"] == f"RuntimeError: a worker died over this row {ROW_DEATHS} times"
    good = [
        s for s in healthy_rows(finished, TOKENS, SHARD, Sample) if s.sample_id != row["sample_id"]
    ]
    assert run.read_shard(TOKENS, SHARD, Sample) == good
    assert run.committed(TOKENS)[SHARD].counts["tries"] == deaths + 1


def test_deaths_that_are_not_the_rows_fault_set_nothing_aside(run: Run, finished: Path) -> None:
    """A worker that is killed over and over, at another row each time."""
    for row in ("", "", "", "a/0", "b/0", "c/0"):
        shard_worker.Attempt.begin(run, TOKENS, SHARD).note(row)
    ShardWorker(SMALL, run.store.uri).draw_shard(SHARD)
    assert run.quarantined() == []
    assert run.read_shard(TOKENS, SHARD, Sample) == healthy_rows(finished, TOKENS, SHARD, Sample)


def test_when_every_row_fails_the_cause_is_not_in_the_rows(
    run: Run, monkeypatch: pytest.MonkeyPatch, remembering: Remembering
) -> None:
    class Broken(Failing):
        def sample(self, *_: Any) -> Any:
            raise RuntimeError("no space left")

    model = Broken(remembering, "")
    monkeypatch.setattr(shard_worker, "load_generator_and_judge", lambda *_: (model, model))
    with pytest.raises(
        UserError,
        match=r"all 3 rows of shard unsafe-build-0000 fail in stage tokens.*no space left",
    ):
        ShardWorker(SMALL, run.store.uri).draw_shard(SHARD)
    assert run.quarantined() == []
    assert run.committed(TOKENS) == {}


def test_prompts_that_the_model_refuses_may_fill_a_shard(
    run: Run, monkeypatch: pytest.MonkeyPatch, remembering: Remembering
) -> None:
    class Refusing(Failing):
        def sample(self, *_: Any) -> Any:
            raise UserError("the prompt is too long")

    model = Refusing(remembering, "")
    monkeypatch.setattr(shard_worker, "load_generator_and_judge", lambda *_: (model, model))
    ShardWorker(SMALL, run.store.uri).draw_shard(SHARD)
    assert [row["error"] for row in run.quarantined()] == ["UserError: the prompt is too long"] * 3
    assert run.read_shard(TOKENS, SHARD, Sample) == []


def test_a_lost_device_ends_the_process_instead_of_blaming_rows(
    run: Run, failing: Callable[..., Failing]
) -> None:
    failing(sample=fail(RuntimeError("CUDA error: device-side assert triggered")))
    with pytest.raises(DeviceLost):
        ShardWorker(SMALL, run.store.uri).draw_shard(SHARD)
    assert run.quarantined() == []


def test_a_huge_prompt_is_refused_by_the_model_and_set_aside(
    run: Run, tmp_path: Path, facts: ModelSpec
) -> None:
    prompts = load_prompts(SMALL.prompts)
    first = next(i for i, p in enumerate(prompts) if p.role == "unsafe" and p.split == "build")
    prompts[first] = replace(prompts[first], text="a red knife " * 50_000)
    run = create_run(SMALL, str(tmp_path / "huge"), prompts, facts)
    ShardWorker(SMALL, run.store.uri).draw_shard(SHARD)
    (row,) = run.quarantined()
    assert "the model has room for" in row["error"]
    assert len(row["error"]) <= 500


@pytest.mark.parametrize(("share", "status"), [(0.02, "degraded"), (0.5, "complete")])
def test_above_the_share_a_run_ends_degraded_and_says_so(
    run: Run, facts: ModelSpec, failing: Callable[..., Failing], share: float, status: str
) -> None:
    failing(judge=float("nan"))
    config: RunConfig = replace(SMALL, execution=replace(SMALL.execution, quarantine_share=share))
    summary = drive(run.store.uri, facts, config)
    assert summary.status == status
    assert summary.quarantined.rows == 1
    assert summary.quarantined.share == pytest.approx(1 / 24, abs=1e-5)
    assert "no readable answer" in next(iter(summary.quarantined.errors))
    assert table(summary)
    note = _quarantine_note(summary.quarantined, "runs/x", status == "degraded")
    assert "1 rows (4.2% of the pictures) were set aside in runs/x/quarantine" in note
    assert ("raise execution.quarantine_share" in note) == (status == "degraded")
    assert run.verify() == []


def test_another_copy_of_the_weights_is_refused(
    tmp_path: Path, facts: ModelSpec, remembering: Remembering
) -> None:
    other = replace(facts, weights_digest="0" * 64)
    run = create_run(SMALL, str(tmp_path / "run"), load_prompts(SMALL.prompts), other)
    with pytest.raises(UserError, match="has other weights than the run"):
        ShardWorker(SMALL, run.store.uri)


def test_what_an_evaluation_sets_aside_is_not_the_runs_loss(copy: Path, facts: ModelSpec) -> None:
    run = Run.open(str(copy))
    rows = [{"sample_id": f"{i}/0", "error": "ValueError: boom"} for i in range(6)]
    run.quarantine("tokens-negative-prompt-01234567", "unsafe-held_out-0000", rows)
    summary = drive(str(copy), facts)
    assert summary.status == "complete"
    assert summary.quarantined.rows == 0
