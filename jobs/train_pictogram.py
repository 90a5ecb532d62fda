"""Train the embedded pictogram model (picture tokenizer, three skills, auditor) with Ray Train +
DeepSpeed.

    ray job submit --working-dir . -- python jobs/train_pictogram.py --out /shared/pictogram --gpu
    python jobs/train_pictogram.py --out runs/pictogram      # on this machine; hours on 2 cores

Run it again to go on where it stopped. `--install` copies the result into the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from isic_ray.execution.pretraining import STAGES, Schedule, train_pictogram


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="stages to run; default all"
    )
    parser.add_argument(
        "--start-from", type=Path, help="checkpoint folder whose skills are trained further"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="optimiser steps of the stage; default its own"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=0.0,
        help="peak learning rate; default the stage's own",
    )
    parser.add_argument("--workers", type=int, default=1, help="data-parallel workers")
    parser.add_argument("--threads", type=int, default=2, help="torch threads a worker")
    parser.add_argument("--gpu", action="store_true", help="one GPU a worker, nccl")
    parser.add_argument(
        "--install", action="store_true", help="copy the trained weights into the package"
    )
    options = parser.parse_args()
    start = options.start_from and options.start_from.resolve()
    schedule = Schedule(start, options.steps, options.learning_rate)
    train_pictogram(
        options.out,
        options.stages,
        schedule,
        options.workers,
        options.threads,
        options.gpu,
        options.install,
    )


if __name__ == "__main__":
    main()
