"""The loop end to end, on a run directory that real Ray wrote."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isic_ray.codebook import ArtifactMeta, SafeCodebook, table_digest
from isic_ray.config.run import ModelConfig, SamplingConfig
from isic_ray.errors import UserError
from isic_ray.metrics.summary import Summary
from isic_ray.models.registry import load_model
from isic_ray.report.write import write_report
from isic_ray.runs.run import Run
from isic_ray.runs.schema import HELD_OUT, Sample, Verdict
from isic_ray.runs.shards import TOKENS, codebook_blob, verdict_stage
from isic_ray.workflows.export import export_run
from isic_ray.workflows.loop import run_isic
from isic_ray.workflows.worker import ShardWorker
from tests.small_run import SMALL

pytestmark = pytest.mark.usefixtures("local_ray")

Finished = tuple[Path, Summary]


def test_the_summary_has_the_stable_shape(finished: Finished) -> None:
    out, summary = finished
    stored = json.loads((out / "summary.json").read_text())
    assert stored["schema"] == 2
    assert Summary.from_record(stored, "") == summary
    assert summary.status == "complete"
    first = stored["rounds"][0]
    for rate in (first["unsafe"]["self"], first["unsafe"]["audit"], first["benign"]["audit"]):
        assert rate["n"] == 40
        assert rate["ci"][0] <= rate["rate"] <= rate["ci"][1]
    assert set(summary.arms) == {"random"}
    assert 0 <= summary.best_round < len(summary.rounds)


def test_a_round_makes_held_out_pictures_safer(finished: Finished) -> None:
    _, summary = finished
    before, after = summary.first, summary.best
    assert summary.best_round >= 1
    for judge in ("self", "audit"):
        assert after.figures.unsafe[judge].rate < before.figures.unsafe[judge].rate - 0.15


def test_later_rounds_sample_nothing(finished: Finished) -> None:
    _, summary = finished
    assert summary.first.sampled > 0
    assert [each.sampled for each in summary.rounds[1:]] == [0] * (len(summary.rounds) - 1)


def test_the_same_command_again_resumes_and_changes_nothing(finished: Finished) -> None:
    out, summary = finished
    before = sorted(path.name for path in (out / "commits").rglob("*.json"))
    assert run_isic(SMALL, str(out)) == summary
    assert sorted(path.name for path in (out / "commits").rglob("*.json")) == before


def test_other_settings_are_refused_by_name(finished: Finished) -> None:
    out, _ = finished
    with pytest.raises(UserError, match=r"sampling\.seed"):
        run_isic(replace(SMALL, sampling=SamplingConfig(seed=1)), str(out))


def test_every_object_of_the_run_verifies(finished: Finished) -> None:
    assert Run.open(str(finished[0])).verify() == []


def test_every_verdict_names_the_codebook_that_drew_it(finished: Finished) -> None:
    """Of held-out pictures under each round's codebook, of the others where another round was
    built on it.
    """
    out, summary = finished
    run, rounds = Run.open(str(out)), summary.rounds
    assert len(rounds) > 2, "the fixture must have a round that builds on another"
    built_on = {rounds[each.round - 1].codebook for each in rounds[1:]}
    for digest in {each.tried or each.codebook for each in rounds}:
        rows = run.read(verdict_stage(digest), Verdict)
        assert {row.codebook_digest for row in rows} == {digest}
        due = {
            s.sample_id
            for s in run.read(TOKENS, Sample)
            if s.split == HELD_OUT or digest in built_on
        }
        assert {row.sample_id for row in rows} == due


def test_only_pictures_that_changed_are_judged_again(finished: Finished, tmp_path: Path) -> None:
    out, summary = finished
    shutil.copytree(out, tmp_path / "run")
    worker = ShardWorker(SMALL, str(tmp_path / "run"))
    known = summary.best.codebook
    table = worker.table(known).clone()
    shard = next(name for name, shard in worker.shards.items() if shard.split == HELD_OUT)
    samples = worker.run_dir.read_shard(TOKENS, shard, Sample)
    row = samples[0].tokens[0]
    touched = {sample.sample_id for sample in samples if row in sample.tokens}
    table[row] = -table[row]
    digest = table_digest(table)
    artifact = SafeCodebook.from_tables(
        worker.model.codebook, table, ArtifactMeta("none", "janus", 9)
    )
    worker.run_dir.put_blob(codebook_blob(digest), artifact.to_bytes())

    assert worker.judge_shard(shard, digest, known)["touched"] == len(touched) < len(samples)
    before, after = (
        {
            (row.judge, row.sample_id): row
            for row in worker.run_dir.read_shard(verdict_stage(stage), shard, Verdict)
        }
        for stage in (known, digest)
    )
    assert before.keys() == after.keys()
    for key, verdict in after.items():
        assert verdict.codebook_digest == digest
        if key[1] not in touched:
            assert verdict == replace(before[key], codebook_digest=digest)
    fresh = {row.sample_id: row for row in worker._judge(samples, digest) if row.judge == "self"}
    assert all(after["self", name].scores == fresh[name].scores for name in fresh)


def test_tokens_do_not_depend_on_actors_shards_or_batches(
    finished: Finished, rebatched: Path
) -> None:
    def tokens(out: Path) -> dict[str, tuple[int, ...]]:
        return {row.sample_id: row.tokens for row in Run.open(str(out)).read(TOKENS, Sample)}

    assert tokens(finished[0]) == tokens(rebatched)


def test_the_artifact_on_a_stock_model_draws_the_runs_pictures_and_reverts(
    finished: Finished,
) -> None:
    out, summary = finished
    run = Run.open(str(out))
    samples = run.read(TOKENS, Sample)[:24]
    tokens = torch.tensor([sample.tokens for sample in samples])
    ours = load_model(ModelConfig())
    artifact = SafeCodebook.from_bytes(run.get_blob(summary.safe_codebook))
    expected = ours.decode(tokens, artifact.apply_to(ours.codebook))

    stock = load_model(ModelConfig()).model  # type: ignore[attr-defined]
    table = stock.model.vqmodel.quantize.embedding.weight
    before = table.detach().clone()
    artifact.apply(stock)
    assert table_digest(table) == summary.best.codebook
    np.testing.assert_array_equal(_stock_pictures(stock, tokens), expected)
    artifact.revert(stock)
    assert torch.equal(table, before)


def _stock_pictures(stock: Any, tokens: torch.Tensor) -> np.ndarray:
    """Stock transformers' pictures, in the blocks of eight that the adapter uses (kernels round
    by batch size).
    """
    with torch.no_grad():
        pixels = torch.cat([stock.decode_image_tokens(block) for block in tokens.split(8)])
    return np.asarray(((pixels + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8).numpy())


def test_the_export_loads_in_stock_transformers(finished: Finished, tmp_path: Path) -> None:
    from transformers import JanusForConditionalGeneration, JanusProcessor

    out, summary = finished
    directory = export_run(str(out), str(tmp_path / "exported"))
    model = JanusForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    JanusProcessor.from_pretrained(directory)
    table = model.model.vqmodel.quantize.embedding.weight
    assert table_digest(table) == summary.best.codebook
    with pytest.raises(UserError, match="not empty"):
        export_run(str(out), directory)


def test_the_report_is_written_and_self_contained(finished: Finished) -> None:
    page = Path(write_report(str(finished[0]))).read_text()
    assert "<img" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert len(page) < 5_000_000
