"""Draws where the time goes, from the figures of `jobs/benchmark.py`, and prints the tables of
docs/speed.md.

    python jobs/benchmark_picture.py tests/results/benchmark.json tests/results/benchmark.svg \\
        runs/demo/summary.json
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

COLOURS = ("#3b6fb6", "#e08214", "#5aae61", "#9970ab", "#bf5b4b", "#999999")
WIDTH, HEIGHT, LEFT = 760, 34, 150


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "summary", type=Path, help="of a run, whose rounds say how long their stages took"
    )
    options = parser.parse_args()
    figures = json.loads(options.figures.read_text())["pictogram"]
    speeds = figures["stages"]["1 threads"]
    seconds = {name.removesuffix("_per_s"): 1 / speed for name, speed in speeds.items()}
    stages = {name: own / sum(seconds.values()) for name, own in seconds.items()}
    kinds = {name: share for name, share in figures["profile"].items() if name != "hardware"}
    bars = bar("a picture", stages, 20) + bar("sampling it", kinds, 110)
    options.out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 10} 200" '
        'font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/>{bars}</svg>\n'
    )
    print(table(figures), costs(json.loads(options.summary.read_text())), sep="\n\n")


def table(figures: dict[str, Any]) -> str:
    """Sampling against stock `generate` in Markdown."""
    lines = [
        "| batch | stock images/s | ours images/s | times | share of the floor |",
        "|---|---|---|---|---|",
    ]
    for batch, row in figures["sampler"]["1 threads"]["batches"].items():
        stock, ours = row["stock_images_per_s"], row["ours_images_per_s"]
        times, share = row["times_stock"], row["share_of_floor"]
        lines.append(f"| {batch} | {stock:.0f} | {ours:.0f} | {times:.1f} | {share:.0%} |")
    return "\n".join(lines)


def costs(summary: dict[str, Any]) -> str:
    """What each stage of a run took in Markdown, next to the first round: drawing and all of
    round 1.
    """
    drawing, *rounds = summary["rounds"]
    first = drawing["seconds"] + rounds[0]["seconds"]
    spent = {"drawing, judging and pairing": drawing["seconds"]}
    for entry in rounds:
        spent |= {
            f"round {entry['round']}: {stage}": seconds for stage, seconds in entry["spent"].items()
        }
        spent[f"round {entry['round']}, whole"] = entry["seconds"]
    lines = ["| stage | seconds | share of drawing and round 1 |", "|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {name} | {own:.0f} | {own / first:.0%} |" for name, own in spent.items())]
    )


def bar(title: str, shares: dict[str, float], top: int) -> str:
    """One stacked bar with a legend below it."""
    parts, left, legend = [f'<text x="10" y="{top + 22}">{title}</text>'], float(LEFT), float(LEFT)
    for (name, share), colour in zip(shares.items(), COLOURS, strict=False):
        label = f"{name} {share:.0%}"
        width = share * WIDTH
        parts.append(
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{HEIGHT}" '
            f'fill="{colour}"/>'
        )
        below = top + HEIGHT
        parts.append(
            f'<rect x="{legend:.0f}" y="{below + 8}" width="11" height="11" fill="{colour}"/>'
        )
        parts.append(
            f'<text x="{legend + 15:.0f}" y="{below + 18}" font-size="11">{escape(label)}</text>'
        )
        left, legend = left + width, legend + 24 + 6.0 * len(label)
    return "".join(parts)


if __name__ == "__main__":
    main()
