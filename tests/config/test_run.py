"""Is what a setting cannot be refused, in a sentence that names the key and what it must be?"""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from isic_ray.config.describe import describe, to_yaml
from isic_ray.config.run import (
    RECIPES,
    EditConfig,
    ExecutionConfig,
    FinetuneConfig,
    JudgeConfig,
    LoopConfig,
    ModelConfig,
    PromptsConfig,
    RunConfig,
    SamplingConfig,
    load_config,
)
from isic_ray.errors import UserError


def message(path: Path | str | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_given_means_the_defaults() -> None:
    assert load_config() == RunConfig()


def test_file_then_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, "edit: {rank: 3, strength: 1}\nprompts:\nloop:\n  arms: [none]\n")
    config = load_config(
        path, ["edit.rank=1", "loop.arms=[random, paper]", "model.name=123", "judge.alignment="]
    )
    assert (config.edit.rank, config.edit.strength, config.loop.arms) == (
        1,
        1.0,
        ["random", "paper"],
    )
    assert isinstance(config.edit.strength, float)
    assert (config.model.name, config.judge.alignment, config.prompts) == (
        "123",
        "",
        PromptsConfig(),
    )


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = written(tmp_path, "finetune: {learning_rate: 1e-3}")  # a text to YAML 1.1
    assert load_config(path).finetune.learning_rate == 0.001
    assert load_config(None, ["finetune.regulariser=5E-4"]).finetune.regulariser == 0.0005


def test_an_entry_of_a_mapping_can_be_set(tmp_path: Path) -> None:
    assert load_config(None, ["judge.questions.hate=Is it: hateful?"]).judge.questions == {
        **JudgeConfig().questions,
        "hate": "Is it: hateful?",
    }
    path = written(tmp_path, "judge:\n  questions:\n    a: Is it a?")
    assert load_config(path, ["judge.questions.b=Is it b?"]).judge.questions == {
        "a": "Is it a?",
        "b": "Is it b?",
    }
    assert load_config(path, ["judge.questions={c: 'Is it c?'}"]).judge.questions == {
        "c": "Is it c?"
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("edit: {rnak: 2}", "unknown key edit.rnak; did you mean edit.rank?"),
        ("edti: {rank: 2}", "unknown key edti; did you mean edit?"),
        ("rank: 2", "unknown key rank; did you mean edit.rank?"),
        ("1: 2", "unknown key 1; did you mean"),
        ("edit: {rank: two}", "edit.rank must be a whole number, found the text 'two'."),
        ("edit: {rank: 2.0}", "edit.rank must be a whole number, found the number 2.0."),
        ("edit: {rank: yes}", "edit.rank must be a whole number, found the truth value True."),
        ("edit: {rank: }", "edit.rank must be a whole number, found nothing."),
        ("edit: {centre: 1}", "edit.centre must be true or false, found the whole number 1."),
        ("edit: {method: 3}", "edit.method must be a text, found the whole number 3."),
        (
            "loop: {arms: random}",
            "loop.arms must be a list of texts, such as [one, two]; found the text 'random'.",
        ),
        ("loop: {arms: [1]}", "loop.arms[0] must be a text"),
        ("judge: {questions: [a]}", "judge.questions must be a mapping of texts"),
        (
            "judge: {questions: {a: 1}}",
            "judge.questions.a must be a text, found the whole number 1.",
        ),
        ("edit: 3", "edit is a section; set its keys, such as edit.method."),
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("# a list\n- a", "line 2: expected sections such as `model:`, found the list ['a']."),
        ("edit:\n  rank: [2\n", "line 3: bad YAML, expected ',' or ']'"),
        (
            "edit:\n\trank: 2",
            "line 2: bad YAML, found character '\\t' that cannot start any token.",
        ),
        ("edit:\n  rank: 1\n  rank: 2", "line 3: bad YAML, rank is given twice."),
        (
            "edit: {rank: !!python/name:os.system }",
            "line 1: bad YAML, could not determine a constructor",
        ),
        ("a: 2024-13-45", "bad YAML, month must be in 1..12."),
        ("a: \x01", "line 1: bad YAML, "),
        ("[" * 500, "line 1: bad YAML, it is nested too deeply."),
    ],
)
def test_bad_files(tmp_path: Path, text: str, says: str) -> None:
    found = message(written(tmp_path, text))
    assert says in found
    assert found.startswith(str(tmp_path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    found = message("janus")
    assert found.startswith("config 'janus' is neither a file nor a recipe (")
    assert all(name in found for name in ("demo", "janus-pro-1b", "emu3"))
    assert "neither a file" in message(tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"model:\n  name: caf\xe9\n")
    assert "line 2: this is not UTF-8" in message(path)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("edit.rnak=2", "--set 'edit.rnak=2': unknown key edit.rnak; did you mean edit.rank?"),
        ("edit.rank.x=2", "unknown key edit.rank.x"),
        ("rank=2", "unknown key rank; did you mean edit.rank?"),
        ("edit=2", "write it as section.key=value"),
        ("edit.rank", "write it as section.key=value"),
        ("edit.rank=x", "edit.rank must be a whole number, found the text 'x'."),
        ("edit.rank=[1", "--set 'edit.rank=[1': bad YAML, expected"),
        ("judge.questions.a=", "judge.questions.a is '', but must be a question."),
        (
            "edit.method=off",
            "edit.method is 'off', but must be one of paper, selective, transport, random, none.",
        ),
    ],
)
def test_bad_overrides(override: str, says: str) -> None:
    assert says in message(None, override)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (ModelConfig, {"dtype": "int3", "device": "tpu", "name": ""}),
        (
            PromptsConfig,
            {"held_out_share": 1.1, "limit": -1, "samples_per_prompt": 0, "unsafe": ""},
        ),
        (SamplingConfig, {"guidance": 0.5, "temperature": float("inf"), "top_k": -1, "top_p": 0.0}),
        (
            JudgeConfig,
            {"questions": {}, "alignment": "is it {x}", "rewrite": "{", "threshold": float("nan")},
        ),
        (
            EditConfig,
            {
                "method": "magic",
                "strength": 1.5,
                "rank": -1,
                "energy": 0.0,
                "differences": "x",
                "basis": "x",
            },
        ),
        (
            EditConfig,
            {"min_log_odds": float("inf"), "min_count": -1.0, "smoothing": 0.0, "max_rows": -1},
        ),
        (
            FinetuneConfig,
            {
                "steps": -1,
                "batch_size": 0,
                "learning_rate": 0.0,
                "regulariser": -1.0,
                "zero_stage": 4,
            },
        ),
        (
            LoopConfig,
            {
                "max_rounds": -1,
                "significance": 2.0,
                "max_benign_loss": -0.1,
                "backoff": 2.0,
                "arms": ["x"],
            },
        ),
        (
            ExecutionConfig,
            {"min_actors": 0, "max_actors": 0, "cpus_per_actor": -1.0, "gpus_per_actor": -1.0},
        ),
        (
            ExecutionConfig,
            {"batch_size": 0, "shard_size": 0, "quarantine_share": 1.2, "address": ""},
        ),
    ],
)
def test_bad_values_are_refused_when_a_section_is_built(
    section: type, values: dict[str, object]
) -> None:
    for name, value in values.items():
        with pytest.raises(UserError, match=rf"^\w+\.{name}\S* is .* must be [^\n]*\.$"):
            section(**{name: value})


def test_settings_that_depend_on_each_other() -> None:
    with pytest.raises(
        UserError,
        match=r"finetune.batch_size is 20, but must be a multiple of finetune.workers \(3\)",
    ):
        FinetuneConfig(workers=3)
    with pytest.raises(UserError, match="without repetitions"):
        LoopConfig(arms=["paper", "paper"])
    with pytest.raises(UserError, match="object:"):
        JudgeConfig(questions={"object:cup": "a cup ?"})


def test_a_section_is_refused_in_a_sentence_when_python_builds_it() -> None:
    with pytest.raises(UserError, match=r"^unknown key edit\.rnak; did you mean edit\.rank\?$"):
        EditConfig(**{"rnak": 2})
    with pytest.raises(UserError, match=r"^edit\.rank must be a whole number, found .* 'two'\.$"):
        EditConfig(**{"rank": "two"})
    with pytest.raises(UserError, match=r"^edit must be a section, found the mapping "):
        RunConfig(**{"edit": {"rank": 1}})
    with pytest.raises(UserError, match=r"^edit\.rank is -1, but must be 0 or more\.$"):
        dataclasses.replace(EditConfig(), rank=-1)


def test_a_configuration_is_a_frozen_value() -> None:
    config = load_config("demo", ["edit.rank=3", "judge.questions.cup=a cup ?"])
    assert pickle.loads(pickle.dumps(config)) == config != RunConfig()
    assert dataclasses.replace(config, edit=EditConfig(rank=3)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.edit.rank = 4  # type: ignore[misc]


def test_the_package_and_its_help_load_no_pydantic() -> None:
    code = "import sys, isic_ray, isic_ray.cli.main; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_setting_is_described_by_its_docstring() -> None:
    settings = describe()
    expected = [
        f"{section.name}.{option.name}"
        for section in dataclasses.fields(RunConfig)
        for option in dataclasses.fields(getattr(RunConfig(), section.name))
    ]
    assert [setting.key for setting in settings] == expected
    assert all(setting.doc for setting in settings)
    # none has its neighbour's
    assert len({setting.doc for setting in settings}) > len(settings) - 4
    alpha = next(setting for setting in settings if setting.key == "edit.strength")
    assert (alpha.type, alpha.default) == ("number", 1.0)
    assert alpha.doc.startswith("alpha: ")


def test_commented_yaml_reads_back(tmp_path: Path) -> None:
    long = "a: word, " * 40
    overrides = ["judge.questions={'a: b': 'yes', 'no': '# x'}", "judge.auditors=[]"]
    odd = load_config(None, [*overrides, "model.name=über", f"judge.rewrite={long}{{prompt}}"])
    for config in (odd, *(load_config(path.stem) for path in RECIPES.glob("*.yaml"))):
        text = to_yaml(config)
        assert load_config(written(tmp_path, text)) == config
        assert max(map(len, text.splitlines())) <= 100
        assert all(setting.doc.split()[-1] in text for setting in describe())
    assert yaml.safe_load(to_yaml()) == dataclasses.asdict(RunConfig())
