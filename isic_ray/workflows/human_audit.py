"""The human spot-check: a small blinded sheet of pictures out, the labels back in.

The sheet shows pictures as they are, in random order, without prompt, judge or whether the edit
drew them. Which picture is which is not in the sheet: when labels come back, it is worked out again
from the run, the number of pictures and the seed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

from isic_ray.errors import UserError
from isic_ray.metrics.labels import LabelFigures, label_figures
from isic_ray.metrics.results import RunResults
from isic_ray.models.base import UnifiedModel
from isic_ray.models.registry import load_model
from isic_ray.report.html import Picture
from isic_ray.report.spot_check import sheet
from isic_ray.runs.schema import HELD_OUT, UNSAFE, Sample

SHEET, LABELS = "audit.html", "labels.csv"
BEFORE, AFTER = "before", "after"
FIGURES = "audit/human.json"
_YES, _NO = {"unsafe", "yes", "y", "1", "true"}, {"safe", "no", "n", "0", "false"}


@dataclass(frozen=True)
class _Item:
    """One picture of the sheet; ``name`` tells nothing of the rest."""

    name: str
    sample: Sample
    when: str


@dataclass(frozen=True)
class _Labels:
    """A file of labels: what the sheet was made with, and by picture whether it is unsafe."""

    count: int
    seed: int
    unsafe: dict[str, bool]


def sample_sheet(
    uri: str, directory: str, count: int, seed: int = 0, model: UnifiedModel | None = None
) -> str:
    """Write a sheet of ``count`` pictures and an empty table of labels, and return ``directory``.

    Half of the pictures are drawn by the unedited codebook, half by the edited one: simple random
    samples of the held-out unsafe prompts of the finished run at ``uri``. ``model``: the run's
    model where it is loaded already. Raises UserError when there are too few pictures, or the
    directory is not empty.
    """
    target = Path(directory)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; give --to a new or empty directory")
    results = RunResults.open(uri)
    items = _items(results, count, seed)
    pictures = _decode(results, model or load_model(results.config.model), items)
    pictures.sort(key=lambda pair: pair[0])  # names are digests, so this is a random order
    target.mkdir(parents=True, exist_ok=True)
    page = sheet(pictures, LABELS, list(results.config.judge.questions))
    (target / SHEET).write_text(page, encoding="utf-8")
    rows = "".join(f"{name},\n" for name, _ in pictures)
    head = f"# count={count} seed={seed}\npicture,label\n"
    (target / LABELS).write_text(head + rows, encoding="utf-8")
    return str(target)


def import_labels(uri: str, path: str) -> dict[str, LabelFigures]:
    """Read labels back, store what they say as `FIGURES`, and return it before and after the edit.

    Raises UserError for labels that are not of this run, unknown words, and a file without labels.
    """
    results, labels = RunResults.open(uri), _read_labels(path)
    items = {item.name: item for item in _items(results, labels.count, labels.seed)}
    strangers = labels.unsafe.keys() - items.keys()
    if strangers:
        raise UserError(
            f"{path} labels {min(strangers)}, which is no picture of this run's sheet; "
            "give its own labels"
        )
    if not labels.unsafe:
        raise UserError(f"{path} holds no label yet; write unsafe or safe beside each picture")
    found = {}
    for when, digest in ((BEFORE, results.base), (AFTER, results.best)):
        truth = {
            items[name].sample.sample_id: flag
            for name, flag in labels.unsafe.items()
            if items[name].when == when
        }
        found[when] = label_figures(results.verdicts(digest, HELD_OUT, UNSAFE), truth)
    record = {when: figures.to_record() for when, figures in found.items()}
    results.run.store.put(FIGURES, json.dumps(record, indent=1, allow_nan=False).encode())
    return found


def _decode(
    results: RunResults, model: UnifiedModel, items: list[_Item]
) -> list[tuple[str, Picture]]:
    """Return each item's name and picture."""
    found: list[tuple[str, Picture]] = []
    for when, table in ((BEFORE, None), (AFTER, results.table(results.best, model.codebook))):
        chosen = [item for item in items if item.when == when]
        pictures = model.decode(torch.tensor([item.sample.tokens for item in chosen]), table)
        found += [(item.name, picture) for item, picture in zip(chosen, pictures, strict=True)]
    return found


def _items(results: RunResults, count: int, seed: int) -> list[_Item]:
    """Choose the pictures of a sheet: the same ones for the same run, count and seed."""
    held_out = [s for s in results.samples if s.role == UNSAFE and s.split == HELD_OUT]
    samples = sorted(held_out, key=lambda sample: sample.sample_id)
    half = count // 2
    if not 0 < half <= len(samples):
        raise UserError(
            f"--n is {count}, but must be from 2 to {2 * len(samples)}: "
            "half of the pictures on either side"
        )
    rng, key = Random(seed), results.run.record["fingerprint"]
    found = []
    for when in (BEFORE, AFTER):
        for sample in rng.sample(samples, half):
            text = f"{key}/{seed}/{when}/{sample.sample_id}"
            found.append(_Item(hashlib.sha256(text.encode()).hexdigest()[:10], sample, when))
    return found


def _read_labels(path: str) -> _Labels:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    head, _, body = text.partition("\n")
    settings = dict(part.partition("=")[::2] for part in head.lstrip("# ").strip(" ,").split())
    count, seed = settings.get("count", ""), settings.get("seed", "")
    if not (count.isdigit() and seed.isdigit()):
        raise UserError(
            f"{path} has lost its first line (# count=… seed=…); "
            "fill in the file that the sheet came with"
        )
    unsafe: dict[str, bool] = {}
    for row in csv.reader(io.StringIO(body)):
        word = row[1].strip().lower() if len(row) > 1 else ""
        if not word or row[0] == "picture":
            continue
        if word not in _YES | _NO:
            raise UserError(f"{path} labels {row[0]} {word!r}; write unsafe or safe")
        unsafe[row[0].strip()] = word in _YES
    return _Labels(int(count), int(seed), unsafe)
