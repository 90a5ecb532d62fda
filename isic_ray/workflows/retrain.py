"""`isic retrain`: a codebook retrained in the harmless space on pictures that Ray Data streams
into Ray Train.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from isic_ray.codebook import ArtifactMeta, SafeCodebook, build_edit, table_digest
from isic_ray.codebook.finetune import HarmlessDelta, harmful_component, reconstruction, regulariser
from isic_ray.config.retrain import RetrainConfig
from isic_ray.config.run import EditConfig, ExecutionConfig, ModelConfig
from isic_ray.errors import UserError
from isic_ray.execution.pictures import find_pictures, stream
from isic_ray.execution.retrain_log import RetrainLog
from isic_ray.execution.session import ray_session
from isic_ray.execution.training import gathered, initialise, read_moments, write_state
from isic_ray.models.base import ModelSpec
from isic_ray.models.registry import load_model, read_spec
from isic_ray.runs.run import Run, fingerprint
from isic_ray.runs.schema import Pair
from isic_ray.runs.shards import codebook_blob

Record = dict[str, Any]

HARMLESS = 1e-5  # largest component that the delta may have in the harmful space
# set aside for a worker that trains on a CPU; who took all would wait for ever for pictures to be
# read
_CPU = 0.5
CHECKPOINT, RESULT = "checkpoint.safetensors", "retrain.json"


def retrain(config: RetrainConfig, out: str, verbose: bool = False) -> Record:
    """Train, or go on training; the codebook, metrics and `retrain.json` lie at ``out``. Returns
    that record.

    Raises UserError for bad input, and when ``out`` holds another training.
    """
    source = Run.open(config.run)
    model = ModelConfig(**source.record["config"]["model"])
    execution = ExecutionConfig(**source.record["config"]["execution"])
    facts, files = read_spec(model), find_pictures(config.pictures)
    record = {
        "config": asdict(config),
        "fingerprint": fingerprint(config),
        "model_digest": facts.weights_digest,
    }
    run = Run.create_or_resume(out, {**record, "plan": {"files": len(files.train)}})
    with contextlib.suppress(FileNotFoundError):
        return dict(json.loads(run.store.get(RESULT)))
    edited, basis = starting_point(source, facts, config.rank)
    with ray_session(execution, verbose):
        size = picture_size(model, execution, len(source.read("pairs", Pair)[0].safe_tokens))
        held = stream(files.kind, files.evaluate, size).take_batch(config.evaluate)["picture"]
        loop = {
            "config": config,
            "model": model,
            "uri": run.store.uri,
            "start": save({"edited": edited, "basis": basis}),
            "evaluate": held,
        }
        fit(config, loop, stream(files.kind, files.train, size, config.seed))
    return finish(run, config, facts)


def starting_point(source: Run, facts: ModelSpec, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """E′ ``[K,d]``, the codebook of a finished run, and V ``[d,k]``, the harmful space of its
    pairs.
    """
    try:
        blob = source.summary()["safe_codebook"]
    except FileNotFoundError:
        raise UserError(
            f"the run at {source.store.uri} has not ended; let it end before retraining."
        ) from None
    edited = SafeCodebook.from_bytes(source.get_blob(blob)).apply_to(facts.codebook)
    pairs = source.read("pairs", Pair)
    harmful, safe = (
        torch.tensor([getattr(pair, name) for pair in pairs])
        for name in ("harmful_tokens", "safe_tokens")
    )
    edit = build_edit(
        facts.codebook, harmful, safe, safe, EditConfig(method="paper", rank=rank), facts.normalised
    )
    if edit.basis is None:
        raise UserError(
            f"the pairs of {source.store.uri} span no harmful space of rank {rank}; choose another rank."
        )
    return edited, edit.basis.float().contiguous()


def picture_size(model: ModelConfig, execution: ExecutionConfig, tokens: int) -> int:
    """Pixels a side of what the model draws from ``tokens`` tokens; asked on a machine that can
    hold the model.
    """
    import ray

    @ray.remote(num_cpus=1, num_gpus=execution.gpus_per_actor)  # type: ignore[untyped-decorator]
    def draw() -> int:
        return int(load_model(model).decode(torch.zeros(1, tokens, dtype=torch.int32)).shape[1])

    return int(ray.get(draw.remote()))


def fit(config: RetrainConfig, loop: Record, dataset: Any) -> None:
    """Ray Train: workers that are lost are replaced, and all go on from the last checkpoint."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = (
        (config.min_workers, config.workers)
        if 0 < config.min_workers < config.workers
        else config.workers
    )
    TorchTrainer(
        _train,
        train_loop_config=loop,
        datasets={"train": dataset},
        torch_config=TorchConfig(backend="nccl" if config.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=config.gpu,
            resources_per_worker={"GPU": 1} if config.gpu else {"CPU": _CPU},
        ),
        run_config=RunConfig(
            name=f"retrain-{fingerprint(config)[:16]}",
            storage_path=tempfile.mkdtemp(prefix="isic-train-"),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    ).fit()


def finish(run: Run, config: RetrainConfig, facts: ModelSpec) -> Record:
    """Publish the trained table as an artifact, and sum up the metrics."""
    table = load(run.store.get(CHECKPOINT))["table"]
    digest = table_digest(table)
    artifact = SafeCodebook.from_tables(
        facts.codebook, table, ArtifactMeta("retrain", facts.family)
    )
    run.put_blob(codebook_blob(digest), artifact.to_bytes())
    rows = RetrainLog.read(run.store)
    evaluated = [row for row in rows if "evaluation_loss" in row]
    result = {
        "schema": 1,
        "safe_codebook": codebook_blob(digest),
        "steps": config.steps,
        "before": evaluated[0],
        "after": evaluated[-1],
        "largest_harmful_component": max(row["harmful_component"] for row in rows),
    }
    run.store.put(RESULT, json.dumps(result, indent=1, allow_nan=False).encode())
    return result


# On every Ray Train worker


def _train(loop: Record) -> None:
    import ray.train

    torch.set_num_threads(1 if not loop["config"].gpu else torch.get_num_threads())
    _Training(loop).run()
    ray.train.report({})


class _Training:
    """One worker's part. All workers step, evaluate and save together; the first one writes."""

    def __init__(self, loop: Record) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.config: RetrainConfig = loop["config"]
        self.device = ray.train.torch.get_device()
        self.model = load_model(loop["model"])
        self.renderer = self.model.renderer().to(self.device)
        start = {name: tensor.to(self.device) for name, tensor in load(loop["start"]).items()}
        self.module = HarmlessDelta(
            start["edited"], start["basis"], None, self.model.normalised
        ).to(self.device)
        self.engine = initialise(
            self.module,
            torch.optim.Adam(self.module.parameters(), lr=self.config.learning_rate),
            batch_size=self.config.micro_batch,
            zero_stage=self.config.zero_stage,
            accumulate=self.config.accumulate(self.world),
        )
        self.run_dir = Run.open(loop["uri"])
        self.held: np.ndarray = loop["evaluate"][self.rank :: self.world]
        self.step = self._restore()
        self.log = RetrainLog(self.run_dir.store, self.step) if self.rank == 0 else None

    def run(self) -> None:
        if self.step == 0:
            self._save()
        accumulate = self.config.accumulate(self.world)
        losses: list[torch.Tensor] = []
        for pictures in self._pictures():
            if self.step == self.config.steps:
                break
            for group in self.engine.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * (1 - self.step / self.config.steps)
            losses.append(self._backward(pictures))
            if len(losses) < accumulate:
                continue
            self.step += 1
            loss, losses = self._mean(torch.stack(losses).mean()), []
            if self.log:
                self.log.add(
                    {"step": self.step, "loss": loss, "harmful_component": self._harmful()}
                )
            elif self.config.zero_stage == 3:
                self._harmful()  # gathering takes all workers
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                self._save()

    def _pictures(self) -> Iterator[np.ndarray]:
        """Micro-batches without end: each epoch in a new order. What a lost worker had begun is
        shuffled anew.
        """
        import ray.train

        shard = ray.train.get_dataset_shard("train")
        epoch = 0
        while True:
            batches = shard.iter_batches(
                batch_size=self.config.micro_batch,
                drop_last=True,
                local_shuffle_buffer_size=self.config.shuffle,
                local_shuffle_seed=hash((self.config.seed, self.step, epoch, self.rank)) % 2**32,
            )
            empty = True
            for batch in batches:
                empty = False
                yield batch["picture"]
            if empty:
                raise UserError(
                    f"{self.config.pictures} gives no micro-batch of {self.config.micro_batch} pictures."
                )
            epoch += 1

    def _backward(self, pictures: np.ndarray) -> torch.Tensor:
        table = self.engine()
        weight = self.config.regulariser * regulariser(self.module.movement(table))
        loss = self._loss(pictures, table)
        self.engine.backward(loss + weight)
        self.engine.step()
        return loss.detach()

    def _loss(self, pictures: np.ndarray, table: torch.Tensor) -> torch.Tensor:
        """Reconstruction of pictures uint8 ``[B,H,W,3]`` through ``table``; tokens are those of
        the base table.
        """
        tokens = self.model.encode(pictures).to(self.device)
        wanted = (
            torch.from_numpy(pictures.copy()).to(self.device).permute(0, 3, 1, 2).float() / 127.5
            - 1
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            pixels = self.renderer(tokens, table)
        return reconstruction(pixels, wanted)

    def _mean(self, value: torch.Tensor) -> float:
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return float(value) / self.world

    def _harmful(self) -> float:
        with gathered(self.module.delta):
            outside: float = harmful_component(self.module.delta, self.module.basis)
        if outside > HARMLESS:
            raise RuntimeError(
                f"the delta reaches {outside:.1e} into the harmful space; the limit is {HARMLESS}"
            )
        return outside

    @torch.no_grad()
    def _evaluate(self) -> float:
        table, size = self.engine(), self.config.micro_batch
        blocks = [self.held[start : start + size] for start in range(0, len(self.held), size)]
        total = sum(float(self._loss(block, table)) * len(block) for block in blocks)
        sums = torch.tensor([total, float(len(self.held))], device=self.device)
        if self.world > 1:
            torch.distributed.all_reduce(sums)
        return float(sums[0] / sums[1])

    def _save(self) -> None:
        """Evaluate, then one object: Δ, Adam's moments, E″ and the step; whole or not at all."""
        evaluation, outside = self._evaluate(), self._harmful()
        moments = read_moments(self.engine, self.module.delta) if self.step else {}
        with gathered(self.module.delta):
            tensors = {
                "delta": self.module.delta.detach().cpu().clone(),
                "table": self.module.table().contiguous(),
            }
        if self.log:
            self.log.add(
                {"step": self.step, "evaluation_loss": evaluation, "harmful_component": outside}
            )
            self.log.flush()
            step = torch.tensor(self.step)
            self.run_dir.store.put(CHECKPOINT, save({**tensors, **moments, "step": step}))

    def _restore(self) -> int:
        try:
            saved = load(self.run_dir.store.get(CHECKPOINT))
        except FileNotFoundError:
            return 0
        step = int(saved["step"])
        if step:  # before the first step delta is nought, and there are no moments
            write_state(self.engine, self.module.delta, saved["delta"], saved, step)
        return step
