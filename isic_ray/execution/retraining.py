"""Retraining a codebook with Ray Train and DeepSpeed, on pictures that Ray Data streams."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from isic_ray.codebook.finetune import HarmlessDelta, harmful_component, reconstruction, regulariser
from isic_ray.config.retrain import RetrainConfig
from isic_ray.config.run import ExecutionConfig, ModelConfig
from isic_ray.errors import UserError
from isic_ray.execution.retrain_log import RetrainLog
from isic_ray.execution.training import gathered, initialise, read_moments, write_state
from isic_ray.models.registry import load_model
from isic_ray.runs.run import Run, fingerprint

HARMLESS = 1e-5  # largest component that the delta may have in the harmful space
# Set aside for a worker that trains on a CPU: workers that took all CPUs would wait for ever for
# pictures to be read.
_CPU = 0.5
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Retraining:
    """What every worker of a retraining is given."""

    config: RetrainConfig
    model: ModelConfig
    uri: str
    """Where checkpoints and metrics lie."""
    start: bytes
    """E′ ``[K,d]`` as "edited" and V ``[d,k]`` as "basis", in safetensors."""
    evaluate: np.ndarray
    """Pictures uint8 ``[B,H,W,3]`` that are set aside to evaluate on."""


def picture_size(model: ModelConfig, execution: ExecutionConfig, tokens: int) -> int:
    """Return the pixels per side of what the model draws from ``tokens`` tokens.

    It is asked on a machine that can hold the model.
    """
    import ray

    @ray.remote(num_cpus=1, num_gpus=execution.gpus_per_actor)  # type: ignore[untyped-decorator]
    def draw() -> int:
        return int(load_model(model).decode(torch.zeros(1, tokens, dtype=torch.int32)).shape[1])

    return int(ray.get(draw.remote()))


def fit(retraining: Retraining, dataset: Any) -> None:
    """Train on a Ray Data set of pictures, with a column "picture" uint8 ``[H,W,3]``.

    Workers that are lost are replaced, and all go on from the last checkpoint.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = retraining.config
    elastic = 0 < config.min_workers < config.workers
    workers = (config.min_workers, config.workers) if elastic else config.workers
    TorchTrainer(
        _train,
        train_loop_config={"retraining": retraining},
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


def _train(loop: dict[str, Any]) -> None:
    """Train; on every Ray Train worker."""
    import ray.train

    retraining: Retraining = loop["retraining"]
    torch.set_num_threads(torch.get_num_threads() if retraining.config.gpu else 1)
    _Training(retraining).run()
    ray.train.report({})


class _Training:
    """One worker's part. All workers step, evaluate and save together; the first one writes."""

    def __init__(self, given: Retraining) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.config = given.config
        self.device = ray.train.torch.get_device()
        self.model = load_model(given.model)
        self.renderer = self.model.renderer().to(self.device)
        start = {name: tensor.to(self.device) for name, tensor in load(given.start).items()}
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
        self.run_dir = Run.open(given.uri)
        self.held = given.evaluate[self.rank :: self.world]
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
        """Micro-batches without end, each epoch in a new order.

        What a lost worker had begun is shuffled again.
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
                    f"{self.config.pictures} gives no micro-batch of {self.config.micro_batch} "
                    "pictures; give more pictures, or a smaller micro_batch."
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
        """Reconstruction of pictures uint8 ``[B,H,W,3]`` through ``table``.

        Tokens are those of the base table.
        """
        tokens = self.model.encode(pictures).to(self.device)
        pixels = torch.from_numpy(pictures.copy()).to(self.device).permute(0, 3, 1, 2)
        wanted = pixels.float() / 127.5 - 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            drawn = self.renderer(tokens, table)
        return reconstruction(drawn, wanted)

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
        if step:  # before the first step delta is zero, and there are no moments
            write_state(self.engine, self.module.delta, saved["delta"], saved, step)
        return step
