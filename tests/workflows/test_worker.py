"""What an actor does for every family, without Ray: draw, judge, pair, and judge again under an
edited table.
"""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from isic_ray.codebook import ArtifactMeta, SafeCodebook, table_digest
from isic_ray.execution.progress import Progress
from isic_ray.models.base import SamplingSettings
from isic_ray.models.registry import read_spec
from isic_ray.prompts.sets import load_prompts
from isic_ray.runs.schema import BUILD, UNSAFE, Pair, Sample, Verdict
from isic_ray.runs.shards import TOKENS, codebook_blob, redrawn_stage, verdict_stage
from isic_ray.workflows.loop import IsicLoop, create_run
from isic_ray.workflows.worker import ShardWorker
from tests.workflows.test_families import CASES, SAMPLING, configure


@pytest.mark.parametrize("family", CASES)
def test_shards_are_drawn_judged_paired_and_judged_again(family: str, tmp_path: Path) -> None:
    config = configure(tmp_path, CASES[family])
    facts = read_spec(config.model)
    uri = str(tmp_path / "run")
    run = create_run(config, uri, load_prompts(config.prompts), facts)
    worker = ShardWorker(config, uri)
    for name in worker.shards:
        worker.draw_shard(name)
    samples = run.read(TOKENS, Sample)
    assert len(samples) == len(run.read(verdict_stage(worker.base_digest), Verdict)) == 25
    assert len(run.read("pairs", Pair)) > 0

    edited = facts.codebook.clone()
    edited[: len(edited) // 2] += 0.5 * torch.randn(edited[: len(edited) // 2].shape)
    digest = table_digest(edited)
    artifact = SafeCodebook.from_tables(facts.codebook, edited, ArtifactMeta("test", family))
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
    assert redrawn == facts.tokens_depend_on_codebook
    loop = IsicLoop(config, run, load_prompts(config.prompts), facts, Progress(io.StringIO()))
    loop.load()
    pairs = loop.pairs_under(digest)
    assert [pair.safe_tokens for pair in pairs] == [pair.safe_tokens for pair in loop.pairs]
    assert (pairs != loop.pairs) == redrawn
    if redrawn:
        anew = {
            sample.sample_id: sample.tokens for sample in run.read(redrawn_stage(digest), Sample)
        }
        assert any(pair.sample_id in anew for pair in pairs)
        assert all(
            pair.harmful_tokens == anew.get(pair.sample_id, pair.harmful_tokens) for pair in pairs
        )
        assert len(loop.redrawn(digest)) == len(anew) == len(worker.shards[name].cells)
        sample = run.read_shard(redrawn_stage(digest), name, Sample)[0]
        text, settings = (
            worker.prompts[sample.prompt_id].text,
            SamplingSettings(SAMPLING.guidance, SAMPLING.temperature),
        )
        under = worker.model.sample([text], [sample.seed], settings, edited)  # type: ignore[call-arg]
        assert under[0].tolist() == list(sample.tokens)
        assert sample.tokens != next(s.tokens for s in samples if s.sample_id == sample.sample_id)
