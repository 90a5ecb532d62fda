"""Measure the shipped embedded model on scenes its training never saw; print JSON.

    python jobs/measure_pictogram.py --count 500 --out tests/results/pictogram.json

It takes about 2 minutes on 2 cores; --out writes the JSON to a file, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

from isic_ray.config.run import ModelConfig
from isic_ray.models.registry import load_model
from isic_ray.pictogram.auditor import PictogramAuditor
from isic_ray.workflows.measure_pictogram import measure


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--count", type=int, default=500, help="pictures of each kind")
    parser.add_argument("--model", default="pictogram", help="checkpoint folder")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    model = load_model(ModelConfig(name=options.model))
    figures = measure(model, PictogramAuditor(), options.count)
    result = {"machine": f"{platform.machine()}, {os.cpu_count()} CPU cores", "figures": figures}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
