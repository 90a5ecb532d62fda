"""Load prompt sets, from files (CSV, JSONL, Parquet; local or any fsspec URI) or embedded ones.

A set becomes `schema.Prompt` rows. A file needs a text column; concepts, objects, split, group and
id columns are optional. `COLUMNS` lists the names that are understood, in order of preference,
`BENIGN_TEXT` those that a benign set prefers; FILE#COLUMN names the text column. The published sets
are read as they are published; seeds in them belong to diffusion models and are not used.
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
from isic_ray.prompts.columns import BENIGN_TEXT, COLUMNS, KNOWN_SETS, SPELLINGS, SPLITS, TYPO
from isic_ray.prompts.tables import Row, Table, canonical, read_table
from isic_ray.runs.schema import BENIGN, BUILD, HELD_OUT, UNSAFE, Prompt, prompt_id

EMBEDDED = ("pictogram:unsafe", "pictogram:benign")


@dataclass(frozen=True)
class PromptSet:
    """The distinct prompts of one source, and what was found on the way to them."""

    source: str
    prompts: list[Prompt]
    rows: int
    duplicates: int  # rows left out because an earlier one says the same
    columns: list[str]  # all that the source has
    used: dict[str, str]  # the column that serves each purpose: {"text": "sensitive prompt", …}

    @property
    def known_as(self) -> tuple[str, int] | None:
        """Return the published set that has these columns, and its rows when whole.

        The rows are 0 where they are not known to us; None for no such set.
        """
        columns = {canonical(column) for column in self.columns}
        return next(((name, rows) for name, wanted, rows in KNOWN_SETS if wanted <= columns), None)

    @property
    def splits(self) -> dict[str, int]:
        """Return the number of prompts by split."""
        return {
            split: sum(prompt.split == split for prompt in self.prompts)
            for split in (BUILD, HELD_OUT)
        }

    @property
    def categories(self) -> dict[str, int]:
        """Return the number of prompts by concept, most common first."""
        found = Counter(concept for prompt in self.prompts for concept in prompt.concepts)
        return dict(found.most_common())


def load_prompts(config: PromptsConfig) -> list[Prompt]:
    """Load the unsafe and the benign set, at most ``limit`` prompts of each set and split.

    Both have build and held-out prompts. Raises UserError for a file that cannot be read, a bad row
    (named), a missing text column, or an empty split.
    """
    unsafe = load_set(config.unsafe, UNSAFE, config)
    benign = load_set(config.benign, BENIGN, config)
    return [*unsafe.prompts, *benign.prompts]


def load_set(source: str, role: str, config: PromptsConfig) -> PromptSet:
    """Load one set, with its limit applied. Raises UserError as `load_prompts` does."""
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
    """Read all prompts of a source, without a run. Raises UserError as `read_set` does."""
    role = BENIGN if source == EMBEDDED[1] else UNSAFE
    return read_set(source, role, PromptsConfig().held_out_share)


def read_set(source: str, role: str, held_out_share: float) -> PromptSet:
    """Read all prompts of a source; a split may be empty.

    Raises UserError for what cannot be read and for bad rows.
    """
    if source.startswith("pictogram:"):
        return _embedded(source, role)
    path, _, column = source.partition("#")
    known = {name for names in COLUMNS.values() for name in names}
    table = read_table(path, known | set(BENIGN_TEXT) | {canonical(column)})
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
    """Return the SHA-256, in hex, of all rows in order.

    It tells whether a resumed run still means the same prompts.
    """
    rows = json.dumps([asdict(prompt) for prompt in prompts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(rows.encode()).hexdigest()


def normalise(text: str) -> str:
    """Return the text by which duplicates are found.

    It has one case, single spaces, and compatible characters unified (NFKC).
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_of(text: str, held_out_share: float) -> str:
    """Return the split of a prompt that its file gives none.

    It goes by hash, so neither order nor other prompts change it.
    """
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
    """Return a concept's label in small letters.

    I2P's categories come out as I2P writes them, however they are written or misspelt.
    """
    plain = canonical(label)
    if plain in SPELLINGS:
        return SPELLINGS[plain]
    if len(plain) >= 6:
        alike = difflib.get_close_matches(plain, SPELLINGS, n=1, cutoff=TYPO)
        if alike:
            return SPELLINGS[alike[0]]
    return label.lower()


def _recognise(table: Table, role: str, text: str = "") -> dict[str, str]:
    """Return the column that serves each purpose. Raises UserError when none holds the text."""
    by_name = {canonical(column): column for column in reversed(table.columns)}
    columns = ", ".join(map(repr, table.columns)) or "none"
    if text and canonical(text) not in by_name:
        raise UserError(f"{table.path} has no column {text!r}; its columns are {columns}.")
    kinds = dict(COLUMNS)
    if text:
        kinds["text"] = (canonical(text),)
    elif role == BENIGN:
        kinds["text"] = (*BENIGN_TEXT, *COLUMNS["text"])
    found = {
        kind: [by_name[name] for name in names if name in by_name] for kind, names in kinds.items()
    }
    if not found["text"]:
        *names, last = COLUMNS["text"]
        raise UserError(
            f"{table.path} has no text column, its columns are {columns}; call the one with the "
            f"prompts {', '.join(names)} or {last}."
        )
    return {kind: matches[0] for kind, matches in found.items() if matches}


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
            f"{row.place} has the split {split!r}; write {BUILD} or {HELD_OUT}, or remove the "
            "column."
        )
    if "prompt_id" in used and not name:
        raise UserError(
            f"{row.place} has no {used['prompt_id']!r}; fill it in, or remove the column."
        )
    labels = row.texts(used["concepts"]) if "concepts" in used else ()
    return Prompt(
        prompt_id=f"{role}-{name}" if name else prompt_id(role, text),
        text=text,
        role=role,
        split=SPLITS[canonical(split)] if split else split_of(text, held_out_share),
        concepts=tuple(dict.fromkeys(map(category, labels))),
        objects=row.texts(used["objects"]) if "objects" in used else (),
        group=group,
    )


def _check_splits(found: PromptSet) -> None:
    """Raise UserError unless there are prompts in both splits."""
    if not found.prompts:
        raise UserError(f"{found.source} holds no prompts; add some rows.")
    empty = [split for split, count in found.splits.items() if not count]
    if not empty:
        return
    if "split" in found.used:
        fix = (
            f"mark some rows {empty[0]} in column {found.used['split']!r}, or remove that column "
            "to split by hash"
        )
    else:
        fix = "give more prompts, a split column, or another prompts.held_out_share"
    count = len(found.prompts)
    raise UserError(f"none of the {count} prompts of {found.source} are {empty[0]} prompts; {fix}.")
