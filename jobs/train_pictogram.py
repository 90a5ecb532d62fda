"""Train the embedded pictogram model (VQ, vision + language, auditor) with Ray Train + DeepSpeed.

    ray job submit --working-dir . -- python jobs/train_pictogram.py --out /shared/pictogram [--gpu]
    python jobs/train_pictogram.py --out runs/pictogram          # on this machine; about 90 minutes on 2 CPU cores

Run it again to go on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from isic_ray.execution.pretraining import run_stage
from isic_ray.models.pictogram.checkpoint import build_model, build_processor
from isic_ray.models.pictogram.training import VQStage


def build_vq() -> VQStage:
    return VQStage(build_model(build_processor()).model.vqmodel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "vq.safetensors").exists():
        run_stage(build_vq, options.out, workers=options.workers, gpu=options.gpu, threads=options.threads)


if __name__ == "__main__":
    main()
