"""A Janus generator with another Janus as its judge, through Ray: every verdict is the judge's
own.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isic_ray.config.run import (
    FinetuneConfig,
    JudgeConfig,
    LoopConfig,
    ModelConfig,
    PromptsConfig,
    RunConfig,
)
from isic_ray.metrics.summary import SELF
from isic_ray.models.registry import load_model, resolve_checkpoint
from isic_ray.runs.run import Run
from isic_ray.runs.schema import BENIGN, Sample, Verdict
from isic_ray.runs.shards import TOKENS, verdict_stage
from isic_ray.workflows.evaluate import evaluate
from isic_ray.workflows.loop import run_isic
from isic_ray.workflows.measures import Plan
from tests.small_run import SMALL

pytestmark = pytest.mark.usefixtures("local_ray")

LAST_NORM = "model.language_model.norm.weight"


@pytest.fixture(scope="module")
def other_janus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with halved logits: it answers as the generator does, but is less
    certain.
    """
    directory = tmp_path_factory.mktemp("judge") / "janus"
    shutil.copytree(resolve_checkpoint("pictogram"), directory)
    weights = load_file(directory / "model.safetensors")
    weights[LAST_NORM] *= 0.5
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def config(other_janus: Path) -> RunConfig:
    return replace(
        SMALL,
        prompts=PromptsConfig(limit=6),
        judge=JudgeConfig(model=str(other_janus)),
        finetune=FinetuneConfig(steps=0),
        loop=LoopConfig(max_rounds=0, arms=[]),
    )


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = str(tmp_path_factory.mktemp("run") / "two-janus")
    run_isic(config, out)
    return Run.open(out)


def test_verdicts_are_the_judges_own(run: Run, config: RunConfig) -> None:
    generator, judge = load_model(ModelConfig()), load_model(ModelConfig(config.judge.model))
    base = run.rounds()[0]["codebook"]
    found = {
        row.sample_id: row for row in run.read(verdict_stage(base), Verdict) if row.judge == SELF
    }
    samples = [sample for sample in run.read(TOKENS, Sample) if sample.role != BENIGN]
    pictures = generator.decode(torch.tensor([sample.tokens for sample in samples]))
    questions = list(config.judge.questions.values())
    expected = judge.judge(pictures, questions)
    assert (expected - generator.judge(pictures, questions)).abs().max() > 1e-4
    scores = torch.tensor([found[sample.sample_id].scores for sample in samples])
    torch.testing.assert_close(scores, expected)


def test_its_evaluation_has_a_negative_prompt_and_degrades_nothing(
    run: Run, config: RunConfig
) -> None:
    plan = Plan(limit=0, negative="knife", attacked=0, recovery_pictures=0)
    negative = evaluate(run.store.uri, plan)["arms"]["negative prompt"]
    assert negative["unsafe"]["self"]["n"] == 6
    assert run_isic(config, run.store.uri).status == "complete"
