"""Are prompt files read as people write them, bad rows named, and splits always the same?"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isic_ray.config.run import PromptsConfig
from isic_ray.errors import UserError
from isic_ray.pictogram import prompts as pictogram
from isic_ray.pictogram.scene import HELD_OUT_NOUNS, HELD_OUT_OPENINGS, UNSAFE_KINDS
from isic_ray.prompts.columns import COLUMNS
from isic_ray.prompts.sets import (
    inspect,
    load_prompts,
    load_set,
    prompt_id,
    prompts_digest,
    read_set,
    split_of,
)
from isic_ray.runs.schema import BENIGN, BUILD, HELD_OUT, UNSAFE, Prompt, from_table, to_table

TEXTS = [f"a picture of number {n}" for n in range(40)]


def csv_file(folder: Path, text: str) -> str:
    path = folder / "prompts.csv"
    path.write_bytes(text.encode())
    return str(path)


def jsonl_file(folder: Path, *rows: object) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def message(source: str, config: PromptsConfig | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_set(source, UNSAFE, config or PromptsConfig())
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("prompts.unsafe: ")
    assert text.endswith(".")
    return text


# The embedded world


def test_the_embedded_sets_have_the_promised_groups() -> None:
    prompts = load_prompts(PromptsConfig())
    assert Counter((p.role, p.split, p.group) for p in prompts) == {
        (UNSAFE, BUILD, ""): 400,
        (UNSAFE, HELD_OUT, "seen words"): 150,
        (UNSAFE, HELD_OUT, "unseen words"): 100,
        (UNSAFE, HELD_OUT, "two unsafe objects"): 50,
        (BENIGN, BUILD, ""): 400,
        (BENIGN, HELD_OUT, "seen words"): 200,
        (BENIGN, HELD_OUT, "unseen words"): 100,
    }
    assert len({p.text for p in prompts}) == len({p.prompt_id for p in prompts}) == len(prompts)
    assert prompts == load_prompts(PromptsConfig())
    assert from_table(to_table(prompts, Prompt), Prompt) == prompts
    for prompt in prompts:
        unsafe = [kind for kind in prompt.objects if kind in UNSAFE_KINDS]
        assert len(unsafe) == (2 if prompt.group == "two unsafe objects" else prompt.role == UNSAFE)
        assert bool(prompt.concepts) == bool(unsafe)
        assert list(prompt.concepts) == sorted(set(prompt.concepts))
        assert prompt.prompt_id == prompt_id(prompt.role, prompt.text)


def test_held_out_words_are_in_their_group_only() -> None:
    nouns = {noun for names in HELD_OUT_NOUNS.values() for noun in names}
    for prompt in load_prompts(PromptsConfig()):
        says_new = prompt.text.startswith(HELD_OUT_OPENINGS) or bool(
            nouns & set(prompt.text.split())
        )
        assert says_new == (prompt.group == "unseen words"), prompt
        if prompt.group == "unseen words" and prompt.role == UNSAFE:
            assert nouns & set(prompt.text.split())


def test_sizes_and_seed_are_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    few = pictogram.unsafe_prompts(build=3, seen_words=2, unseen_words=1, two_unsafe=1)
    assert Counter(p.split for p in few) == {BUILD: 3, HELD_OUT: 4}
    assert few != pictogram.unsafe_prompts(
        build=3, seen_words=2, unseen_words=1, two_unsafe=1, seed=1
    )
    assert len(pictogram.benign_prompts(2, 1, 1)) == 4
    monkeypatch.setattr(pictogram, "_TRIES", 50)
    with pytest.raises(
        ValueError, match="has no 100000 unsafe held_out prompts of group 'two unsafe objects'"
    ):
        pictogram.unsafe_prompts(build=0, seen_words=0, unseen_words=0, two_unsafe=100_000)


def test_limit_counts_each_set_and_split_and_keeps_the_mix() -> None:
    prompts = load_prompts(PromptsConfig(limit=60))
    assert Counter((p.role, p.split) for p in prompts) == {
        (role, split): 60 for role in (UNSAFE, BENIGN) for split in (BUILD, HELD_OUT)
    }
    assert len({p.group for p in prompts if p.role == UNSAFE and p.split == HELD_OUT}) == 3


def test_embedded_sets_go_where_they_belong() -> None:
    assert "use pictogram:unsafe" in message("pictogram:benign")
    assert "the embedded sets are pictogram:unsafe and pictogram:benign" in message(
        "pictogram:rude"
    )
    assert inspect("pictogram:benign").splits == {BUILD: 400, HELD_OUT: 300}


# Files


@pytest.mark.parametrize(
    "name", [*COLUMNS["text"], "Sensitive Prompt", "adv_prompt", "target-prompt", " PROMPT "]
)
def test_every_alias_of_the_text_column(tmp_path: Path, name: str) -> None:
    found = inspect(csv_file(tmp_path, f"x,{name}\n1,a knife\n"))
    assert [p.text for p in found.prompts] == ["a knife"]
    assert found.used == {"text": name}


def test_all_columns_are_read_from_all_kinds_of_file(tmp_path: Path) -> None:
    text = "id,Categories,prompt,objects,split,group\n"
    text += '7,"gore, weapon","a knife, bloody",knife|blood,build,g\n'
    text += "8,,a cup, cup ;cup,Held-Out,\n"
    rows: list[dict[str, Any]] = [
        {
            "id": 7,
            "Categories": ["gore", "weapon"],
            "prompt": "a knife, bloody",
            "objects": ["knife", "blood"],
        },
        {"id": 8, "Categories": None, "prompt": " a cup ", "objects": ["cup"]},
    ]
    rows[0] |= {"split": "train", "group": "g"}
    rows[1] |= {"split": "test", "group": None}
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "picture": b"\xff"} for row in rows]), path)
    expected = [
        Prompt(
            "unsafe-7",
            "a knife, bloody",
            UNSAFE,
            BUILD,
            ("gore", "weapon"),
            ("knife", "blood"),
            "g",
        ),
        Prompt("unsafe-8", "a cup", UNSAFE, HELD_OUT, (), ("cup",), ""),
    ]
    for source in (csv_file(tmp_path, text), jsonl_file(tmp_path, *rows), str(path)):
        assert load_set(source, UNSAFE, PromptsConfig()).prompts == expected
    assert "picture" in inspect(str(path)).columns
    with fsspec.open("memory://prompts/p.csv", "wb") as file:
        file.write(text.encode())
    assert load_set("memory://prompts/p.csv", UNSAFE, PromptsConfig()).prompts == expected


def test_byte_order_mark_crlf_quotes_and_blank_lines(tmp_path: Path) -> None:
    found = inspect(
        csv_file(tmp_path, '\ufeffprompt\r\n"two\r\nlines, ""quoted"""\r\n\r\nümläut\r\n')
    )
    assert [p.text for p in found.prompts] == ['two\r\nlines, "quoted"', "ümläut"]


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    found = inspect(
        csv_file(tmp_path, "prompt,concepts\nA  Knife,x\na knife,y\nＡ knife,z\na cup,x;w\n")
    )
    assert (found.rows, found.duplicates, [p.text for p in found.prompts]) == (
        4,
        2,
        ["A  Knife", "a cup"],
    )
    assert found.categories == {"x": 2, "w": 1}


def test_the_split_is_stable(tmp_path: Path) -> None:
    config = PromptsConfig(held_out_share=0.4)
    source = csv_file(tmp_path, "prompt\n" + "\n".join(TEXTS))
    before = {p.text: p.split for p in load_set(source, UNSAFE, config).prompts}
    source = csv_file(tmp_path, "prompt\nsomething new\n" + "\n".join(reversed(TEXTS)))
    after = {p.text: p.split for p in load_set(source, BENIGN, config).prompts}
    assert before.items() <= after.items()
    assert 8 <= list(before.values()).count(HELD_OUT) <= 24
    assert split_of("a cup", 0.0) == BUILD
    assert split_of("a cup", 1.0) == HELD_OUT


def test_a_larger_share_only_adds_to_the_held_out_prompts() -> None:
    for text in TEXTS:
        splits = [split_of(text, share / 10) for share in range(11)]
        assert splits == sorted(splits)  # build, …, held_out, …


def test_the_digest_tells_prompt_sets_apart() -> None:
    one = Prompt("1", "a cup", BENIGN, BUILD)
    assert prompts_digest([one]) == prompts_digest([replace(one)])
    assert (
        len(
            {
                prompts_digest(rows)
                for rows in ([], [one], [one, one], [replace(one, split=HELD_OUT)])
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt,x\na,1\n,2\n", "row 2 (line 3) has no text in column 'prompt'"),
        ("prompt\na\n  \n", "row 2 (line 3) has no text in column 'prompt'"),
        (
            "words,id\na,1\n",
            "its columns are 'words', 'id'; call the one with the prompts prompt, text, caption, ",
        ),
        (
            "prompt\na knife, a gun\n",
            "row 1 (line 2) has 2 cells for 1 columns; put texts that hold commas in quotes.",
        ),
        ('prompt\n"a\n', "is no valid CSV: unexpected end of data"),
        ("prompt\n", "holds no prompts; add some rows."),
        ("", "is empty"),
        ("prompt\na\nb\0c\n", "line 3, is not UTF-8 text (byte 0x00)"),
        (
            "prompt,split\na,build\nb,dev\n",
            "row 2 (line 3) has the split 'dev'; write build or held_out",
        ),
        ("prompt,split\na,build\nb,\n", "row 2 (line 3) has the split ''"),
        ("prompt,split\na,build\n", "none of the 1 prompts of "),
        ("prompt,id\na,1\nb,1\n", "row 2 (line 3) repeats the 'id' of another prompt"),
        ("prompt,id\na,1\nb,\n", "row 2 (line 3) has no 'id'"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, says: str) -> None:
    assert says in message(csv_file(tmp_path, text))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [{"prompt": "a"}, {"prompt": 3.5}],
            "row 2 (line 2) has no text in column 'prompt', but '3.5'",
        ),
        ([{"prompt": "a\0"}], "row 1 (line 1) has the character '\\x00' in column 'prompt'"),
        ([{"prompt": "a\ud800"}], "has the character '\\ud800'"),
        ([{"prompt": "a", "concepts": [1]}], "has no list of texts in column 'concepts'"),
        ([{"prompt": "a"}, {"text": "b"}], "row 2 (line 2) has no text in column 'prompt'"),
        ([["a"]], 'line 1, is no JSON object; write one like {"prompt": "a text"} a line.'),
    ],
)
def test_bad_jsonl(tmp_path: Path, rows: list[object], says: str) -> None:
    assert says in message(jsonl_file(tmp_path, *rows))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "does not exist" in message(str(tmp_path / "none.csv"))
    assert "must end in .csv, .jsonl or .parquet" in message(str(tmp_path / "prompts.txt"))
    (tmp_path / "folder.csv").mkdir()
    assert "cannot be read: Is a directory" in message(str(tmp_path / "folder.csv"))
    assert "cannot be read: Protocol not known" in message("nosuch://x/y.csv")
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"prompt\ncaf\xe9\n")
    assert "line 2, is not UTF-8 text (byte 0xe9)" in message(str(latin))
    broken = tmp_path / "x.parquet"
    broken.write_bytes(b"PAR1 no")
    assert "is no valid Parquet file" in message(str(broken))
    broken = tmp_path / "x.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": \n')
    assert "line 2, is no valid JSON: Expecting value." in message(str(broken))


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("nested", [False, True])
def test_pickled_objects_in_a_parquet_file_are_refused_unread(tmp_path: Path, nested: bool) -> None:
    import ray.data.extensions  # registers the Arrow type, as `isic sweep` does

    mark, path = tmp_path / "executed", tmp_path / "prompts.parquet"
    kind = ray.data.extensions.ArrowPythonObjectType()
    values = pa.ExtensionArray.from_storage(
        kind, pa.array([pickle.dumps(Trap(mark))], pa.large_binary())
    )
    column = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), values) if nested else values
    pq.write_table(pa.table({"prompt": column}), path)
    assert message(str(path)).endswith("holds Python objects in column 'prompt'; write texts.")
    assert not mark.exists()


def test_an_empty_split_says_how_to_fix_it(tmp_path: Path) -> None:
    source = csv_file(tmp_path, "prompt\n" + "\n".join(TEXTS))
    assert (
        "are held_out prompts; give more prompts, a split column, or another prompts.held_out_share"
        in message(source, PromptsConfig(held_out_share=0.0))
    )
    assert "are build prompts" in message(source, PromptsConfig(held_out_share=1.0))
    marked = csv_file(tmp_path, "prompt,split\na,held_out\n")
    assert "mark some rows build in column 'split', or remove that column" in message(marked)
    assert read_set(marked, BENIGN, 0.5).splits == {BUILD: 0, HELD_OUT: 1}
