"""What an actor does for every family, without Ray: draw, judge, pair, and judge again under an
edited table.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from isic_ray.codebook import ArtifactMeta, SafeCodebook, table_digest
from isic_ray.execution.progress import Progress
from isic_ray.models.base import SamplingSettings
from isic_ray.models.registry import read_spec
from isic_ray.prompts.sets import load_prompts
from isic_ray.runs.schema import BUILD, UNSAFE, Pair, Sample, Verdict
from isic_ray.runs.shards import TOKENS, codebook_blob, redrawn_stage, verdict_stage
from isic_ray.workflows.loop import create_run
from isic_ray.workflows.steps import Steps
from isic_ray.workflows.worker import ShardWorker
from isic_ray.workflows.workers import InlineWorkers
from tests.faults.inline import no_training
from tests.workflows.test_families import CASES, SAMPLING, configure


@pytest.mark.parametrize("family", CASES)
def test_shards_are_drawn_judged_paired_and_judged_again(family: str, tmp_path: Path) -> None:
    config = configure(tmp_path, CASES[family])
    spec = read_spec(config.model)
    uri = str(tmp_path / "run")
    run = create_run(config, uri, load_prompts(config.prompts), spec)
    worker = ShardWorker(config, uri)
    for name in worker.shards:
        worker.draw_shard(name)
    samples = run.read(TOKENS, Sample)
    assert len(samples) == len(run.read(verdict_stage(worker.base_digest), Verdict)) == 25
    assert len(run.read("pairs", Pair)) > 0

    edited = spec.codebook.clone()
    edited[: len(edited) // 2] += 0.5 * torch.randn(edited[: len(edited) // 2].shape)
    digest = table_digest(edited)
    artifact = SafeCodebook.from_tables(spec.codebook, edited, ArtifactMeta("test", family))
    run.put_blob(codebook_blob(digest), artifact.to_bytes())
    name = next(
        name
        for name, shard in worker.shards.items()
        if shard.role == UNSAFE and shard.split == BUILD
    )
    assert worker.judge_shard(name, digest)["touched"] > 0
    redrawn = redrawn_stage(digest) in {
        path.name for path in (tmp_path / "run" / "commits").iterdir()
    }
    assert redrawn == spec.tokens_depend_on_codebook
    prompts = load_prompts(config.prompts)
    workers, progress = InlineWorkers(ShardWorker, config, uri), Progress(io.StringIO())
    steps = Steps(config, run, prompts, spec, workers, no_training, progress)
    steps.draw_and_judge()
    pairs = steps._pairs_under(digest)
    assert [pair.safe_tokens for pair in pairs] == [pair.safe_tokens for pair in steps.pairs]
    assert (pairs != steps.pairs) == redrawn
    if redrawn:
        again = run.read(redrawn_stage(digest), Sample)
        tokens = {sample.sample_id: sample.tokens for sample in again}
        assert any(pair.sample_id in tokens for pair in pairs)
        for pair in pairs:
            assert pair.harmful_tokens == tokens.get(pair.sample_id, pair.harmful_tokens)
        assert steps.redrawn(digest) == len(again) == len(worker.shards[name].cells)
        sample = again[0]
        text = worker.prompts[sample.prompt_id].text
        settings = SamplingSettings(SAMPLING.guidance, SAMPLING.temperature)
        model: Any = worker.model  # whose samples depend on a table
        under = model.sample([text], [sample.seed], settings, edited)
        assert under[0].tolist() == list(sample.tokens)
        assert sample.tokens != next(s.tokens for s in samples if s.sample_id == sample.sample_id)
