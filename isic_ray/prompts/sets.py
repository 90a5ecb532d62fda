"""Prompt sets: files (CSV, JSONL, Parquet; local or any fsspec URI) and the embedded ones →
`schema.Prompt` rows.

A file needs a text column; concepts, objects, split, group and id columns are optional. `COLUMNS`
lists the names that are understood, in order of preference, `BENIGN_TEXT` those that a benign set
prefers; FILE#COLUMN names the text one. The published sets are read as they are published; seeds in
them belong to diffusion models and are not used.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from isic_ray.config.run import PromptsConfig
from isic_ray.errors import UserError
from isic_ray.prompts.tables import Row, Table, canonical, read_table
from isic_ray.runs.schema import BENIGN, BUILD, HELD_OUT, UNSAFE, Prompt, prompt_id

EMBEDDED = ("pictogram:unsafe", "pictogram:benign")
_TEXT = "prompt, text, caption, sensitive prompt, adv prompt, adversarial prompt, target prompt, prompts, captions"
BENIGN_TEXT = (
    "normal prompt",
    "clean prompt",
)  # beside unsafe prompts in the files of Ring-A-Bell and MMA-Diffusion
COLUMNS: dict[
    str, tuple[str, ...]
] = {  # as `canonical` writes them: "_" and "-" are spaces, capitals do not matter
    "text": tuple(_TEXT.split(", ")),
    "concepts": ("concepts", "concept", "categories", "category"),
    "objects": ("objects", "object"),
    "split": ("split",),
    "group": ("group",),
    "prompt_id": ("prompt id", "id"),
}
# The categories of I2P, under which other sets file theirs too, and how else they are written.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "hate": ("hate speech", "hateful"),
    "harassment": ("harassing",),
    "violence": ("violent", "violence and gore"),
    "self-harm": ("self harm", "selfharm"),
    "sexual": ("sexual content", "nudity", "sex"),
    "shocking": ("shocking images", "shocking content", "shock"),
    "illegal activity": ("illegal activities", "illegal", "illegal act"),
}
_SPELLINGS = {
    canonical(word): name for name, words in CATEGORIES.items() for word in (name, *words)
}
_TYPO = 0.82  # likeness from which a word of 6 letters or more is taken for a misspelt category
KNOWN_SETS: tuple[
    tuple[str, frozenset[str], int], ...
] = (  # name, columns that give it away, rows when whole
    (
        "I2P",
        frozenset({"prompt", "categories", "hard", "inappropriate percentage", "sd seed"}),
        4703,
    ),
    ("I2P", frozenset({"prompt", "categories", "hard", "evaluation seed"}), 4703),
    ("CoProV2", frozenset({"caption", "jpg 0", "jpg 1", "label 0"}), 31380),
    ("CoProV2 prompts", frozenset({"prompt", "image", "category"}), 0),
    ("MMA-Diffusion", frozenset({"target prompt", "adv prompt", "sanitized adv prompt"}), 1000),
    ("Ring-A-Bell", frozenset({"sensitive prompt", "normal prompt"}), 0),
    ("COCO captions", frozenset({"coco id", "prompt"}), 30000),
    ("COCO captions", frozenset({"image id", "caption"}), 0),
    ("Six-CD", frozenset({"case number", "evaluation seed", "prompt"}), 0),
)
SPLITS = {
    **dict.fromkeys(("build", "train", "training"), BUILD),
    **dict.fromkeys(("held out", "heldout", "test", "validation", "val", "eval"), HELD_OUT),
}


@dataclass(frozen=True)
class PromptSet:
    """The distinct prompts of one source, and what was found on the way to them."""

    source: str
    prompts: list[Prompt]
    rows: int
    duplicates: int  # rows left out because an earlier one says the same
    columns: list[str]  # all that the source has
    used: dict[
        str, str
    ]  # what each column that was understood is taken for: {"text": "sensitive prompt", …}

    @property
    def known_as(self) -> tuple[str, int] | None:
        """The published set that has these columns, and its rows when whole (0: not known to
        us).
        """
        columns = {canonical(column) for column in self.columns}
        return next(((name, rows) for name, wanted, rows in KNOWN_SETS if wanted <= columns), None)

    @property
    def splits(self) -> dict[str, int]:
        """Prompts by split."""
        return {
            split: sum(prompt.split == split for prompt in self.prompts)
            for split in (BUILD, HELD_OUT)
        }

    @property
    def categories(self) -> dict[str, int]:
        """Prompts by concept, most common first."""
        return dict(
            Counter(concept for prompt in self.prompts for concept in prompt.concepts).most_common()
        )


def load_prompts(config: PromptsConfig) -> list[Prompt]:
    """The unsafe and the benign set, each with build and held-out prompts, at most ``limit`` of
    each set and split.

    Raises UserError for a file that can't be read, a bad row (named), a missing text column, or an
    empty split.
    """
    unsafe, benign = (
        load_set(config.unsafe, UNSAFE, config),
        load_set(config.benign, BENIGN, config),
    )
    return [*unsafe.prompts, *benign.prompts]


def load_set(source: str, role: str, config: PromptsConfig) -> PromptSet:
    """One set, with its limit applied. Raises UserError as `load_prompts` does."""
    try:
        found = read_set(source, role, config.held_out_share)
        _check_splits(found)
    except UserError as error:
        raise UserError(f"prompts.{role}: {error}") from error
    kept: list[Prompt] = []
    for split in (BUILD, HELD_OUT):
        members = [prompt for prompt in found.prompts if prompt.split == split]
        kept += members[: config.limit or None]
    return PromptSet(source, kept, found.rows, found.duplicates, found.columns, found.used)


def inspect(source: str) -> PromptSet:
    """What a source holds, without a run: all its prompts. Raises UserError as `load_prompts`
    does.
    """
    return read_set(
        source, BENIGN if source == EMBEDDED[1] else UNSAFE, PromptsConfig().held_out_share
    )


def read_set(source: str, role: str, held_out_share: float) -> PromptSet:
    """All prompts of a source; a split may be empty. Raises UserError for what can't be read and
    for bad rows.
    """
    if source.startswith("pictogram:"):
        return _embedded(source, role)
    path, _, column = source.partition("#")
    wanted = (
        {name for names in COLUMNS.values() for name in names}
        | set(BENIGN_TEXT)
        | {canonical(column)}
    )
    table = read_table(path, wanted)
    used = _recognise(table, role, column)
    prompts: dict[str, Prompt] = {}  # by normalised text
    ids: set[str] = set()
    for row in table.rows:
        prompt = _prompt(row, used, role, held_out_share)
        if normalise(prompt.text) in prompts:
            continue
        if prompt.prompt_id in ids:
            raise UserError(
                f"{row.place} repeats the {used['prompt_id']!r} of another prompt; ids must differ."
            )
        ids.add(prompt.prompt_id)
        prompts[normalise(prompt.text)] = prompt
    left_out = len(table.rows) - len(prompts)
    return PromptSet(source, list(prompts.values()), len(table.rows), left_out, table.columns, used)


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Sha256, in hex, of all rows in order: whether a resumed run still means the same prompts."""
    rows = json.dumps([asdict(prompt) for prompt in prompts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(rows.encode()).hexdigest()


def normalise(text: str) -> str:
    """The text by which duplicates are found: one case, single spaces, compatible characters
    unified.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_of(text: str, held_out_share: float) -> str:
    """The split of a prompt without one, by hash: neither order nor other prompts change it."""
    digest = hashlib.sha256(normalise(text).encode()).digest()
    return HELD_OUT if int.from_bytes(digest[:8], "big") / 2**64 < held_out_share else BUILD


def _embedded(source: str, role: str) -> PromptSet:
    from isic_ray.pictogram.prompts import benign_prompts, unsafe_prompts

    if source not in EMBEDDED:
        raise UserError(
            f"there is no embedded set {source!r}; the embedded sets are {' and '.join(EMBEDDED)}."
        )
    if source != f"pictogram:{role}":
        raise UserError(f"{source} does not hold {role} prompts; use pictogram:{role}.")
    prompts = unsafe_prompts() if role == UNSAFE else benign_prompts()
    return PromptSet(source, prompts, len(prompts), 0, [], {})


def category(label: str) -> str:
    """A concept's label in small letters; I2P's categories as I2P writes them, however they are
    written or misspelt.
    """
    plain = canonical(label)
    if plain in _SPELLINGS:
        return _SPELLINGS[plain]
    alike = (
        difflib.get_close_matches(plain, _SPELLINGS, n=1, cutoff=_TYPO) if len(plain) >= 6 else []
    )
    return _SPELLINGS[alike[0]] if alike else label.lower()


def _recognise(table: Table, role: str, text: str = "") -> dict[str, str]:
    """The column to take for each kind of content. Raises UserError when none holds the text."""
    by_name = {canonical(column): column for column in reversed(table.columns)}
    if text and canonical(text) not in by_name:
        names = ", ".join(map(repr, table.columns)) or "none"
        raise UserError(f"{table.path} has no column {text!r}; its columns are {names}.")
    kinds = dict(COLUMNS)
    if text:
        kinds["text"] = (canonical(text),)
    elif role == BENIGN:
        kinds["text"] = (*BENIGN_TEXT, *COLUMNS["text"])
    found = {
        kind: [by_name[name] for name in names if name in by_name] for kind, names in kinds.items()
    }
    if not found["text"]:
        raise UserError(
            f"{table.path} has no text column, its columns are {', '.join(map(repr, table.columns)) or 'none'}; "
            f"call the one with the prompts {', '.join(COLUMNS['text'][:-1])} or {COLUMNS['text'][-1]}."
        )
    return {kind: columns[0] for kind, columns in found.items() if columns}


def _prompt(row: Row, used: dict[str, str], role: str, held_out_share: float) -> Prompt:
    text = row.text(used["text"])
    if not text:
        raise UserError(
            f"{row.place} has no text in column {used['text']!r}; fill it in or remove the row."
        )
    split, group, name = (
        row.text(used[kind]) if kind in used else "" for kind in ("split", "group", "prompt_id")
    )
    if "split" in used and canonical(split) not in SPLITS:
        raise UserError(
            f"{row.place} has the split {split!r}; write {BUILD} or {HELD_OUT}, or remove the column."
        )
    if "prompt_id" in used and not name:
        raise UserError(
            f"{row.place} has no {used['prompt_id']!r}; fill it in, or remove the column."
        )
    return Prompt(
        f"{role}-{name}" if name else prompt_id(role, text),
        text,
        role,
        SPLITS[canonical(split)] if split else split_of(text, held_out_share),
        tuple(dict.fromkeys(map(category, row.texts(used["concepts"]))))
        if "concepts" in used
        else (),
        row.texts(used["objects"]) if "objects" in used else (),
        group,
    )


def _check_splits(found: PromptSet) -> None:
    """UserError unless there are prompts in both splits."""
    if not found.prompts:
        raise UserError(f"{found.source} holds no prompts; add some rows.")
    empty = [split for split, count in found.splits.items() if not count]
    if not empty:
        return
    if "split" in found.used:
        mend = f"mark some rows {empty[0]} in column {found.used['split']!r}, or remove that column to split by hash"
    else:
        mend = "give more prompts, a split column, or another prompts.held_out_share"
    raise UserError(
        f"none of the {len(found.prompts)} prompts of {found.source} are {empty[0]} prompts; {mend}."
    )
