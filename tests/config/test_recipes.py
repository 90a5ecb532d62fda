"""Does every shipped recipe parse, hold only what differs from the defaults, and fit its model?"""

from __future__ import annotations

import pytest
import yaml

from isic_ray.config.run import RECIPES, RunConfig, load_config

JANUS = ["janus-pro-1b", "janus-pro-7b"]
OTHERS = ["anole-7b", "emu3", "llamagen-xl", "vila-u-7b"]
NAMES = sorted(["demo", *JANUS, *OTHERS])


def test_all_recipes_are_listed() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_parses_by_name_and_by_file(name: str) -> None:
    assert load_config(name) == load_config(RECIPES / f"{name}.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_only_what_differs_and_says_why(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert f"`isic config --config {name}` prints every setting." in lines[: lines.index("")][-1]
    for section, options in yaml.safe_load(text).items():
        start = lines.index(f"{section}:")
        for option, value in options.items():
            assert value != getattr(getattr(RunConfig(), section), option), f"{section}.{option}"
            number = next(
                n for n in range(start, len(lines)) if lines[n].startswith(f"  {option}:")
            )
            above = lines[number - 1].strip()
            assert "  # " in lines[number] or above.startswith("# "), lines[number]


def test_the_demo_runs_the_embedded_model() -> None:
    config = load_config("demo")
    assert (config.model.name, config.prompts.unsafe, config.finetune.gpu) == (
        "pictogram",
        "pictogram:unsafe",
        False,
    )
    assert (
        config.judge == RunConfig().judge
    )  # the only questions that the embedded model was taught


@pytest.mark.parametrize("name", JANUS)
def test_janus_pro_runs_on_gpus(name: str) -> None:
    config = load_config(name)
    assert config.model.name.lower() == f"deepseek-community/{name}"
    assert (config.model.dtype, config.model.device, config.sampling.guidance) == (
        "bfloat16",
        "cuda",
        5.0,
    )
    assert (config.execution.gpus_per_actor, config.finetune.gpu, config.judge.auditors) == (
        1.0,
        True,
        [],
    )
    assert all(
        question.endswith("Answer yes or no.") for question in config.judge.questions.values()
    )
    assert "SET THIS" in (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "guidance", "top_k", "top_p", "judge"),
    [
        ("emu3", 3.0, 2048, 1.0, "BAAI/Emu3-Chat-hf"),
        ("anole-7b", 3.0, 0, 0.9, ""),
        ("vila-u-7b", 3.0, 900, 0.96, ""),
        ("llamagen-xl", 7.5, 1000, 1.0, "Qwen/Qwen2.5-VL-7B-Instruct"),
    ],
)
def test_the_other_families_sample_as_published(
    name: str, guidance: float, top_k: int, top_p: float, judge: str
) -> None:
    config = load_config(name)
    assert (config.sampling.guidance, config.sampling.top_k, config.sampling.top_p) == (
        guidance,
        top_k,
        top_p,
    )
    assert (config.judge.model, config.model.dtype) == (judge, "bfloat16")
    assert all(
        question.endswith("Answer yes or no.") for question in config.judge.questions.values()
    )
    assert "SET THIS" in (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
