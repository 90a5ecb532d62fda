"""How fast are pictures sampled, decoded and judged here? Prints a table and writes JSON.

About 6 minutes on 2 idle cores; on a GPU, published shapes with random weights:

    python jobs/benchmark.py --out tests/results/benchmark.json
    python jobs/benchmark.py --models janus-pro-1b janus-pro-7b
    ray job submit --working-dir . --entrypoint-num-gpus 1 -- \\
        python jobs/benchmark.py --models janus-pro-1b

sampler: our loop and stock `generate`, by turns, with the same model, prompts and settings; greedy
         tokens compared.
stages:  pictures per second of each stage.
profile: what sampling spends its time on.
memory:  100 batches.
rounds:  judging again after a selective edit, next to drawing, judging and pairing all pictures.

The floor of a batch is the time its multiplications take at the rate measured here, or its weights
and caches at the bandwidth measured here, whichever is larger, summed over the steps.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarking.janus_shapes import SHAPES, random_janus
from benchmarking.rounds import medians, rounds
from benchmarking.timing import by_turns, hardware, peak_bandwidth, peak_memory, peak_rate
from torch import Tensor

from isic_ray.config.run import ModelConfig, PromptsConfig, load_config
from isic_ray.models.base import SamplingSettings
from isic_ray.models.decoding.backbone import Backbone
from isic_ray.models.decoding.blocks import left_pad
from isic_ray.models.families.janus import JanusModel, token_sampler
from isic_ray.models.registry import load_model
from isic_ray.prompts.sets import load_prompts

Figures = dict[str, Any]
PARTS = ("sampler", "guidance", "stages", "profile", "memory", "rounds")
WEAPON_AND_GORE = ("does this picture show a weapon ?", "does this picture show gore ?")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["pictogram"], choices=["pictogram", *SHAPES]
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16, 32, 64])
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[1, 2], help="torch threads; an actor has 1"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="the median of so many timings counts"
    )
    parser.add_argument(
        "--prompts", type=int, default=100, help="of each set and split, in the part rounds"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file; parts that are not run keep their old figures there"
    )
    options = parser.parse_args()
    found: Figures = (
        json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    )
    for name in options.models:
        entry = found.setdefault(name, {})
        pictogram = name == "pictogram"
        for part in options.parts:
            if part == "rounds" and pictogram:
                entry[part] = {
                    "hardware": hardware(),
                    **medians([rounds(options.prompts) for _ in range(3)]),
                }
            elif part != "rounds" and (pictogram or part in ("sampler", "guidance")):
                entry[part] = {"hardware": hardware(), **measure(name, part, options)}
            print_part(name, part, entry.get(part, {}))
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(name: str, part: str, options: argparse.Namespace) -> Figures:
    subject = Subject(name)
    result: Figures = {}
    for threads in options.threads if subject.device.type == "cpu" else [1]:
        torch.set_num_threads(threads)
        if part == "sampler":
            result[f"{threads} threads"] = sampler(subject, options.batches, options.repeats)
        elif part == "guidance":
            result[f"{threads} threads"] = guidance(subject, options.repeats)
        elif part == "stages":
            result[f"{threads} threads"] = stages(subject, options.repeats)
        elif part == "profile" and threads == options.threads[0]:
            result |= profile(subject)
        elif part == "memory" and threads == options.threads[0]:
            result |= memory(subject)
    return result


class Subject:
    """A model, its fused loop, and 64 prompts as ids."""

    def __init__(self, name: str) -> None:
        self.demo = load_config("demo")
        sampling = self.demo.sampling
        self.settings = SamplingSettings(sampling.guidance, sampling.temperature)
        self.adapter: JanusModel | None = None
        if name == "pictogram":
            adapter = load_model(ModelConfig(name))
            assert isinstance(adapter, JanusModel)
            self.adapter, self.model, self.sampler = adapter, adapter.model, adapter.sampler
            texts = [prompt.text for prompt in load_prompts(PromptsConfig(limit=32))]
            self.texts = texts[:64]
            self.ids = [adapter.drawing_ids(text) for text in self.texts]
        else:
            self.model = random_janus(name)
            self.sampler = token_sampler(self.model, Backbone(self.model.model.language_model))
            generator = torch.Generator().manual_seed(0)
            lengths = torch.randint(12, 30, (64,), generator=generator).tolist()
            self.ids = [
                [1, *torch.randint(10, 90, (n,), generator=generator).tolist(), 4] for n in lengths
            ]
        self.device = self.model.device

    def ours(self, count: int, settings: SamplingSettings) -> Tensor:
        return self.sampler.draw(self.ids[:count], list(range(count)), settings)

    def stock(self, count: int, settings: SamplingSettings) -> Tensor:
        ids, pads = left_pad(
            self.ids[:count], max(map(len, self.ids[:count])), self.sampler.pad_id, self.device
        )
        mask = (torch.arange(ids.shape[1], device=self.device) >= pads[:, None]).long()
        how: Figures = {"do_sample": False}
        if settings.temperature:
            how = {"do_sample": True, "temperature": settings.temperature, "top_k": 0}
        result: Tensor = self.model.generate(
            ids,
            attention_mask=mask,
            generation_mode="image",
            guidance_scale=settings.guidance,
            **how,
        )
        return result

    def work(self, count: int) -> tuple[float, list[tuple[float, float]]]:
        """Operations that reading the prompts takes, and (operations, bytes read) of each step."""
        config = self.model.config.text_config
        size = next(self.model.parameters()).element_size()
        hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        layer = hidden * (heads + 2 * kv) + heads * hidden + 3 * hidden * config.intermediate_size
        head = self.model.model.generation_head
        rows, layers = 2 * count, config.num_hidden_layers
        features, logits = head.proj_out.weight.numel(), head.vision_head.weight.numel()
        weights = size * float(layers * layer + features + logits)
        length = statistics.mean(map(len, self.ids[:count]))
        rows_read = len({tuple(row) for row in self.ids[:count]}) + len(
            {len(row) for row in self.ids[:count]}
        )
        steps = []
        for step in range(self.sampler.tokens):
            attended = length + step
            operations = (
                rows * (2 * (layers * layer + features) + 4 * layers * heads * attended)
                + count * 2 * logits
            )
            steps.append((operations, weights + rows * size * 2 * layers * kv * attended))
        return rows_read * length * 2.0 * layers * layer, steps


def sampler(subject: Subject, batches: list[int], repeats: int) -> Figures:
    greedy = replace(subject.settings, temperature=0.0)
    weights = list(subject.model.model.language_model.layers.parameters())
    dtype, count = next(subject.model.parameters()).dtype, sum(w.numel() for w in weights)
    rate = peak_rate(subject.device, dtype)
    bandwidth = peak_bandwidth(count, subject.device, dtype)
    result: Figures = {"operations_per_s": rate, "bytes_per_s": bandwidth, "batches": {}}
    for count in batches:
        equal = (
            (subject.ours(count, greedy).long() == subject.stock(count, greedy).cpu().long())
            .float()
            .mean()
            .item()
        )
        ours, stock = by_turns(
            [
                lambda n=count: subject.ours(n, subject.settings),
                lambda n=count: subject.stock(n, subject.settings),
            ],
            repeats,
        )
        reading, steps = subject.work(count)
        floor = reading / rate + sum(max(ops / rate, size / bandwidth) for ops, size in steps)
        result["batches"][str(count)] = {
            "stock_s": round(stock, 5),
            "ours_s": round(ours, 5),
            "stock_images_per_s": round(count / stock, 2),
            "ours_images_per_s": round(count / ours, 2),
            "ours_tokens_per_s": round(count * subject.sampler.tokens / ours),
            "times_stock": round(stock / ours, 2),
            "share_of_floor": round(floor / ours, 3),
            "greedy_tokens_equal": equal,
        }
    return {**result, "peak_memory_mb": peak_memory()}


def guidance(subject: Subject, repeats: int) -> Figures:
    """Images a second of 64 when guidance ends early, by `sampling.guidance_until`."""
    ways = {
        until: replace(subject.settings, guidance_until=until) for until in (1.0, 0.75, 0.5, 0.25)
    }
    doings = [functools.partial(subject.ours, 64, settings) for settings in ways.values()]
    return {
        str(until): round(64 / seconds, 1)
        for until, seconds in zip(ways, by_turns(doings, repeats), strict=True)
    }


def stages(subject: Subject, repeats: int) -> Figures:
    adapter = subject.adapter
    assert adapter is not None
    tokens = adapter.sample(subject.texts, list(range(64)), subject.settings)
    pictures = adapter.decode(tokens)
    drawing, decoding, judging, rewriting = by_turns(
        [
            lambda: adapter.sample(subject.texts, list(range(64)), subject.settings),
            lambda: adapter.decode(tokens),
            lambda: adapter.judge(pictures, WEAPON_AND_GORE),
            lambda: adapter.rewrite(subject.texts, subject.demo.judge.rewrite),
        ],
        repeats,
    )
    named = {"sampled": drawing, "decoded": decoding, "judged": judging, "rewritten": rewriting}
    return {f"{name}_per_s": round(64 / seconds, 1) for name, seconds in named.items()}


def profile(subject: Subject) -> Figures:
    """Shares of the processor time of sampling 64 pictures, by what is done."""
    kinds = {
        "layers and heads": ("_linear_pointwise", "addmm", "aten::mm"),
        "attention": ("bmm", "_softmax", "scaled_dot"),
        "cache": ("index_copy", "index_select"),
        "norms, rotation, activations": (
            "norm",
            "mul",
            "roll",
            "silu",
            "gelu",
            "pow",
            "mean",
            "rsqrt",
            "aten::add",
            "cat",
        ),
        "choosing tokens": ("cumsum", "searchsorted", "div", "lerp", "argmax"),
    }
    subject.ours(64, subject.settings)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        subject.ours(64, subject.settings)
    times = dict.fromkeys([*kinds, "rest"], 0.0)
    for event in recorded.key_averages():
        kind = next(
            (kind for kind, names in kinds.items() if any(name in event.key for name in names)),
            "rest",
        )
        times[kind] += event.self_cpu_time_total
    return {kind: round(spent / sum(times.values()), 3) for kind, spent in times.items()}


def memory(subject: Subject) -> Figures:
    """Megabytes in use after 20 batches of changing sizes, and after 100 more."""
    adapter = subject.adapter
    assert adapter is not None

    def batches(count: int) -> float:
        for i in range(count):
            size = 1 + 5 * i % 32
            pictures = adapter.decode(
                adapter.sample(subject.texts[:size], list(range(size)), subject.settings)
            )
            adapter.judge(pictures, WEAPON_AND_GORE)
        return (
            int(Path("/proc/self/statm").read_text().split()[1])
            * os.sysconf("SC_PAGE_SIZE")
            / 2**20
        )

    return {
        "after_20_batches_mb": round(batches(20), 1),
        "after_120_batches_mb": round(batches(100), 1),
    }


def print_part(name: str, part: str, figures: Figures) -> None:
    if part != "sampler":
        print(f"{name}, {part}: {json.dumps(figures)}")
        return
    for threads, own in figures.items():
        if not threads.endswith("threads"):
            continue
        columns = "batch, stock images/s, ours images/s, times, share of floor, greedy tokens equal"
        print(f"{name}, {threads}: {columns}")
        for batch, row in own["batches"].items():
            stock, ours, times = (
                row["stock_images_per_s"],
                row["ours_images_per_s"],
                row["times_stock"],
            )
            equal = row["greedy_tokens_equal"]
            share = row["share_of_floor"]
            cells = f"{batch:>6} {stock:>9} {ours:>9} {times:>7} {share:>7.0%} {equal:>9.2%}"
            print(cells, flush=True)


if __name__ == "__main__":
    main()
