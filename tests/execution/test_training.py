"""Δ under Ray Train + DeepSpeed: the same table from every ZeRO stage, outside the harmful
space.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from isic_ray.codebook import build_edit
from isic_ray.config.run import EditConfig, FinetuneConfig, ModelConfig
from isic_ray.errors import UserError
from isic_ray.execution.training import DeltaJob, train_deltas, training_groups
from isic_ray.execution.training_queue import TrainingGroups, TrainingQueue
from isic_ray.models.registry import read_spec
from isic_ray.runs.run import Run, fingerprint
from isic_ray.workflows.training_rows import keep_rows
from tests.small_run import SMALL

pytestmark = pytest.mark.usefixtures("local_ray")

TOLERANCE = 1e-5  # largest difference of a table entry between ZeRO stages


@dataclass(frozen=True)
class Bench:
    """Training workers for one run, a paper edit of the embedded table from random pairs, and
    their safe tokens.
    """

    groups: TrainingGroups
    run: Run
    job: DeltaJob
    safe: np.ndarray  # int32 [32,36]

    def train(self, finetune: FinetuneConfig, seed: int = 0) -> torch.Tensor:
        """E″ of the edit."""
        return train_deltas(
            self.groups, finetune, self.run, [self.job], keep_rows(self.safe, finetune, seed)
        )[0]


@contextmanager
def bench(out: Path, finetune: FinetuneConfig, kept: bool = False) -> Iterator[Bench]:
    config, facts = replace(SMALL, finetune=finetune), read_spec(ModelConfig())
    tokens = torch.randint(
        len(facts.codebook), (3, 32, 36), generator=torch.Generator().manual_seed(0)
    )
    edit = build_edit(facts.codebook, *tokens, EditConfig(method="paper", rank=2), facts.normalised)
    record = {
        "config": {},
        "fingerprint": fingerprint(config),
        "model_digest": facts.weights_digest,
        "plan": {},
    }
    run = Run.create_or_resume(str(out), record)
    with closing(training_groups(config, run, facts.codebook, kept)) as groups:
        yield Bench(
            groups,
            run,
            DeltaJob(edit.codebook, edit.basis, None),
            tokens[1].numpy().astype(np.int32),
        )


def deltas(out: Path, finetune: FinetuneConfig) -> tuple[torch.Tensor, DeltaJob]:
    """The edit's E″ trained under ``finetune``, by workers that are not kept, and the edit."""
    with bench(out, finetune) as found:
        return found.train(finetune), found.job


@pytest.fixture(scope="module")
def stage_zero(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return deltas(tmp_path_factory.mktemp("zero") / "0", two_workers(0))[0]


def two_workers(stage: int) -> FinetuneConfig:
    return FinetuneConfig(
        steps=3, batch_size=8, workers=2, zero_stage=stage, target="safe", learning_rate=0.01
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_trains_the_same_delta(
    stage: int, stage_zero: torch.Tensor, tmp_path: Path
) -> None:
    table, job = deltas(tmp_path / "run", two_workers(stage))
    assert not torch.equal(table, job.edited)
    torch.testing.assert_close(table, stage_zero, rtol=0, atol=TOLERANCE)


def test_a_finished_delta_is_read_back_instead_of_trained_again(
    stage_zero: torch.Tensor, tmp_path: Path
) -> None:
    finetune = FinetuneConfig(steps=2, batch_size=8, target="safe")
    first, _ = deltas(tmp_path / "run", finetune)
    commits = sorted((tmp_path / "run" / "commits").rglob("*.json"))
    again, _ = deltas(tmp_path / "run", finetune)
    assert torch.equal(first, again)
    assert sorted((tmp_path / "run" / "commits").rglob("*.json")) == commits


def test_a_kept_group_trains_a_second_job_as_a_new_group_does(tmp_path: Path) -> None:
    """Only the first job pays for the group's start; what it trained must not leak into the
    second.
    """
    finetune = FinetuneConfig(steps=2, batch_size=8, target="safe")
    alone, _ = deltas(tmp_path / "alone", finetune)
    with bench(tmp_path / "kept", finetune, kept=True) as found:
        other = found.train(finetune, seed=1)
        second = found.train(finetune, seed=0)
    assert torch.equal(second, alone)
    assert not torch.equal(other, alone)


def test_a_job_that_cannot_be_done_leaves_the_group_to_others(tmp_path: Path) -> None:
    """A trial whose learning rate blows the codebook up is told so, and the next trial's delta
    is as if alone.
    """
    finetune = FinetuneConfig(steps=2, batch_size=8, target="safe")
    alone, _ = deltas(tmp_path / "alone", finetune)
    with bench(tmp_path / "kept", finetune, kept=True) as found:
        with pytest.raises(UserError, match=r"lower finetune\.learning_rate, which is 1e"):
            found.train(replace(finetune, learning_rate=1e30))
        assert torch.equal(found.train(finetune), alone)


def test_jobs_go_to_the_group_with_the_least_to_do() -> None:
    queue = TrainingQueue(groups=2)
    assert [queue.submit(name) for name in "abc"] == [(0, 0), (1, 0), (0, 1)]
    assert (queue.job(0, 1), queue.job(1, 1)) == ("c", "wait")
    queue.finish(1, 0, "it cannot be")
    assert (queue.outcome(0, 0), queue.outcome(1, 0)) == (None, "it cannot be")
    assert queue.submit("d") == (1, 1)
    queue.finish(1, 0)  # said by a group that was started again: what was said first stands
    assert (queue.outcome(1, 0), queue.done(1)) == ("it cannot be", 1)
    queue.close()
    assert queue.job(1, 2) == "end"
