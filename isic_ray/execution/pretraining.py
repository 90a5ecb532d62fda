"""Training the embedded model's stages under Ray Train + DeepSpeed, with resumable checkpoints."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from isic_ray.execution.training import initialise
from isic_ray.pictogram.auditor import AUDITOR_WEIGHTS
from isic_ray.pictogram.checkpoint import WEIGHTS
from isic_ray.pictogram.training.auditor import AuditorStage
from isic_ray.pictogram.training.model import build_model, build_processor, save
from isic_ray.pictogram.training.picture_tokens import VQStage, build_pool
from isic_ray.pictogram.training.skills import SkillStage
from isic_ray.pictogram.training.stages import Stage

SAVE_EVERY_S = 120.0


STAGES = ("vq", "skills", "auditor")


@dataclass(frozen=True)
class Schedule:
    """What differs from a stage's own schedule; ``start`` is a checkpoint folder whose skills
    are trained further.
    """

    start: Path | None = None
    steps: int = 0
    learning_rate: float = 0.0


def train_pictogram(
    out: Path,
    chosen: Sequence[str],
    schedule: Schedule,
    workers: int,
    threads: int,
    gpu: bool,
    install: bool,
) -> None:
    """Run the chosen stages that have not ended yet; when all have, write the checkpoint (or
    install it).
    """
    out.mkdir(parents=True, exist_ok=True)
    if schedule.start:
        _take_finished_stages(schedule.start, out)
    stages: dict[str, Callable[[], Stage]] = {
        "vq": partial(_vq_stage),
        "skills": partial(_skill_stage, out, schedule.start),
        "auditor": partial(AuditorStage),
    }
    for name in chosen:
        if not (out / f"{name}.safetensors").exists():
            run_stage(stages[name], out, schedule, workers=workers, gpu=gpu, threads=threads)
    if all((out / f"{name}.safetensors").exists() for name in STAGES):
        _write_checkpoint(out, WEIGHTS if install else out / "checkpoint")


def _take_finished_stages(start: Path, out: Path) -> None:
    """The picture tokenizer and the auditor of ``start``, kept as they are."""
    vq = {key: value.float() for key, value in _loaded(start).model.vqmodel.state_dict().items()}
    save_file(_copies(vq), out / "vq.safetensors")
    save_file(load_file(start / AUDITOR_WEIGHTS.name), out / "auditor.safetensors")


def _loaded(folder: Path) -> Any:
    from transformers import JanusForConditionalGeneration

    return JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def _vq_stage() -> VQStage:
    return VQStage(build_model(build_processor()).model.vqmodel)


def _skill_stage(out: Path, start: Path | None) -> SkillStage:
    processor = build_processor()
    model = _loaded(start) if start else build_model(processor)
    model.model.vqmodel.load_state_dict(load_file(out / "vq.safetensors"))
    return SkillStage(model, processor, build_pool(model.model.vqmodel, out / "pool.safetensors"))


def _write_checkpoint(out: Path, directory: Path) -> None:
    processor = build_processor()
    model = build_model(processor)
    trained = load_file(out / "skills.safetensors")
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in trained.items() if k.startswith("model.")}
    )
    save(model, processor, directory)
    auditor = {key: value.half() for key, value in load_file(out / "auditor.safetensors").items()}
    save_file(auditor, directory / AUDITOR_WEIGHTS.name)


def run_stage(
    build: Callable[[], Stage],
    out: Path,
    schedule: Schedule,
    *,
    workers: int,
    gpu: bool,
    threads: int,
) -> None:
    """Train one stage to its end, resuming from ``out`` when it holds a checkpoint of that stage.

    ``build`` runs on each worker. Leaves ``out/<stage>.safetensors`` (the module's state) behind.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        _train_stage,
        train_loop_config={
            "build": build,
            "out": str(out),
            "threads": threads,
            "schedule": schedule,
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker={"GPU": 1} if gpu else {"CPU": 1}
        ),
        run_config=RunConfig(
            name=f"pictogram-{time.time_ns()}", storage_path=str(out.resolve() / "ray")
        ),
    )
    trainer.fit()


def _train_stage(config: dict[str, Any]) -> None:
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(config["threads"])
    torch.manual_seed(0)
    stage: Stage = config["build"]()
    stage.steps = config["schedule"].steps or stage.steps
    stage.learning_rate = config["schedule"].learning_rate or stage.learning_rate
    out = Path(config["out"])
    optimiser = torch.optim.AdamW(
        stage.module.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    engine = initialise(stage.module, optimiser, batch_size=stage.batch_size, zero_stage=0)
    first = _restore(out, stage, optimiser)
    saved, started = time.monotonic(), time.monotonic()
    log = out / f"{stage.name}.log"
    for step in range(first, stage.steps):
        for group in optimiser.param_groups:
            group["lr"] = stage.learning_rate * _schedule(step, stage.steps)
        loss = stage.loss(step, Random(f"{stage.name}/{step}/{rank}"))
        engine.backward(loss)
        engine.step()
        stage.after_step(step)
        if rank == 0 and (step % 20 == 0 or step == stage.steps - 1):
            figures = {
                "step": step,
                "loss": round(loss.item(), 5),
                **{k: round(v, 5) for k, v in stage.report().items()},
            }
            with log.open("a") as file:
                file.write(
                    json.dumps({**figures, "seconds": round(time.monotonic() - started, 1)}) + "\n"
                )
        if rank == 0 and time.monotonic() - saved > SAVE_EVERY_S:
            _save(out, stage, optimiser, step + 1)
            saved = time.monotonic()
    if rank == 0:
        _save(out, stage, optimiser, stage.steps)
        save_file(_copies(stage.module.state_dict()), out / f"{stage.name}.safetensors")
    ray.train.report({"step": stage.steps})


def _copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On CPU and apart from each other: safetensors refuses tensors that share memory, as tied
    embeddings do.
    """
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over 2 % of the steps, then a cosine to 2 %."""
    warm = max(1, steps // 50)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _save(out: Path, stage: Stage, optimiser: torch.optim.Optimizer, step: int) -> None:
    """Module and Adam moments in one safetensors file, replaced atomically (no pickle)."""
    tensors = {f"model/{k}": v for k, v in _copies(stage.module.state_dict()).items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {
            f"adam/{i}/{k}": torch.as_tensor(v).cpu().contiguous().clone() for k, v in state.items()
        }
    part = out / f"{stage.name}.checkpoint.part"
    save_file(tensors, part, metadata={"step": str(step)})
    os.replace(part, out / f"{stage.name}.checkpoint")


def _restore(out: Path, stage: Stage, optimiser: torch.optim.Optimizer) -> int:
    """Load the stage's checkpoint if there is one; returns the step to go on from."""
    from safetensors import safe_open

    path = out / f"{stage.name}.checkpoint"
    if not path.exists():
        return 0
    tensors = load_file(path)
    stage.module.load_state_dict(
        {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
    )
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam/"):
            _, index, name = key.split("/")
            moments.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict(
        {"state": moments, "param_groups": optimiser.state_dict()["param_groups"]}
    )
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
