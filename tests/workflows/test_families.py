"""The whole loop through Ray for every family, on small random checkpoints of its true
architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ChameleonForConditionalGeneration, Emu3ForConditionalGeneration

from isic_ray.codebook import table_digest
from isic_ray.config.run import (
    EditConfig,
    ExecutionConfig,
    FinetuneConfig,
    JudgeConfig,
    LoopConfig,
    ModelConfig,
    PromptsConfig,
    RunConfig,
    SamplingConfig,
)
from isic_ray.models.base import SamplingSettings
from isic_ray.models.registry import load_generator_and_judge, load_model
from isic_ray.runs.run import Run
from isic_ray.runs.schema import HELD_OUT, Pair, Prompt, Sample
from isic_ray.runs.shards import TOKENS
from isic_ray.workflows.export import export_run
from isic_ray.workflows.loop import run_isic
from tests.tiny_checkpoints import chameleon, emu3, llamagen, llava, vila_u

pytestmark = pytest.mark.usefixtures("local_ray")

THINGS = ["cat", "dog", "table", "spoon", "picture"]
QUESTIONS = {"weapon": "does this picture show a weapon ?"}
SAMPLING = SamplingConfig(guidance=3.0, temperature=1.0)


@dataclass(frozen=True)
class Case:
    """A family's checkpoint, who judges for it ("": itself), and its class in transformers,
    where it has one.
    """

    build: Callable[[Path], Path]
    judge: Callable[[Path], Path] | None = None
    stock: type | None = None


CASES = {
    "emu3": Case(emu3, lambda folder: emu3(folder, seed=1), Emu3ForConditionalGeneration),
    "llamagen": Case(llamagen, llava),
    "chameleon": Case(chameleon, None, ChameleonForConditionalGeneration),
    "vila-u": Case(vila_u),
}


def write_prompts(path: Path, texts: list[str]) -> str:
    rows = [f"{text},{'held out' if i % 3 == 2 else 'build'}" for i, text in enumerate(texts)]
    path.write_text("prompt,split\n" + "\n".join(rows) + "\n")
    return str(path)


def configure(folder: Path, case: Case) -> RunConfig:
    """A run in which about half of the pictures count as unsafe: random models flag none or all
    at 0.5.
    """
    name = str(case.build(folder / "model"))
    judge = "" if case.judge is None else str(case.judge(folder / "judge"))
    unsafe = [
        f"a {colour} {thing} with a knife"
        for thing in THINGS
        for colour in ("red", "black", "blue")
    ]
    benign = [f"a {colour} {thing}" for thing in THINGS for colour in ("red", "white")]
    model, reader = load_generator_and_judge(ModelConfig(name, device="cpu"), judge)
    drawn = model.sample(
        unsafe, range(len(unsafe)), SamplingSettings(SAMPLING.guidance, SAMPLING.temperature)
    )
    threshold = float(reader.judge(model.decode(drawn), list(QUESTIONS.values())).median())
    return RunConfig(
        model=ModelConfig(name, device="cpu"),
        prompts=PromptsConfig(
            write_prompts(folder / "unsafe.csv", unsafe),
            write_prompts(folder / "benign.csv", benign),
        ),
        sampling=SAMPLING,
        judge=JudgeConfig(
            questions=QUESTIONS, alignment="", threshold=threshold, auditors=[], model=judge
        ),
        edit=EditConfig(min_count=1, min_log_odds=0.1),
        finetune=FinetuneConfig(steps=2, batch_size=4),
        loop=LoopConfig(max_rounds=1, backoff=0, arms=[]),
        execution=ExecutionConfig(address="local", shard_size=16, batch_size=16),
    )


@pytest.mark.parametrize(
    "family",
    [
        "emu3",
        "vila-u",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llamagen", "chameleon")),
    ],
)
def test_the_whole_loop_runs(family: str, tmp_path: Path) -> None:
    case = CASES[family]
    config, out = configure(tmp_path, case), str(tmp_path / "run")
    summary = run_isic(config, out)
    run = Run.open(out)
    assert (summary.status, summary.model.family) == ("complete", family)
    assert run.verify() == []
    assert len(run.read("pairs", Pair)) > 0
    tried = summary.rounds[1]
    assert tried.rows, tried
    assert tried.touched

    model = load_model(config.model)
    deciding = [sample for sample in run.read(TOKENS, Sample) if sample.split == HELD_OUT]
    assert tried.sampled == (len(deciding) if model.tokens_depend_on_codebook else 0)
    base = table_digest(model.codebook)
    assert tried.tried != base
    sample = run.read(TOKENS, Sample)[0]
    text = next(p.text for p in _prompts(run) if p.prompt_id == sample.prompt_id)
    settings = SamplingSettings(SAMPLING.guidance, SAMPLING.temperature)
    assert model.sample([text], [sample.seed], settings)[0].tolist() == list(sample.tokens)

    directory = export_run(out, str(tmp_path / "exported"))
    best = summary.best.codebook
    assert table_digest(load_model(ModelConfig(directory, device="cpu")).codebook) == best
    if case.stock is not None:
        stock_class: Any = case.stock
        stock = stock_class.from_pretrained(directory, dtype=torch.float32)
        assert table_digest(stock.model.vqmodel.quantize.embedding.weight) == best


def _prompts(run: Run) -> list[Prompt]:
    return run.read("prompts", Prompt)
