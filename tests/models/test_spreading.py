"""Does a model whose layers lie on several devices answer as a whole one?

Without GPUs the layers lie in memory and on disk, by the same hooks of accelerate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Emu3ForConditionalGeneration

from isic_ray.config.run import ModelConfig
from isic_ray.errors import UserError
from isic_ray.models import checkpoints
from isic_ray.models.base import SamplingSettings
from isic_ray.models.checkpoints import spread_map
from isic_ray.models.registry import load_model
from tests.tiny_checkpoints import chameleon, emu3


@pytest.mark.parametrize("make", [emu3, chameleon])
def test_a_spread_model_answers_as_a_whole_one(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = str(make(tmp_path))
    whole = load_model(ModelConfig(directory, device="cpu"))
    monkeypatch.setattr(
        checkpoints, "spread_map", functools.partial(spread_map, devices=["cpu", "disk"])
    )
    spread = load_model(ModelConfig(directory, device="spread"))
    last = spread.model.get_decoder().layers[-1]  # type: ignore[attr-defined]
    assert next(last.parameters()).is_meta  # it is elsewhere indeed
    settings = SamplingSettings()
    tokens = spread.sample(["a red cat", "a knife"], [1, 2], settings)
    assert torch.equal(tokens, whole.sample(["a red cat", "a knife"], [1, 2], settings))
    pictures = spread.decode(tokens)
    assert (pictures == whole.decode(tokens)).all()
    assert torch.equal(spread.encode(pictures), whole.encode(pictures))
    torch.testing.assert_close(
        spread.judge(pictures, ["is it ?"]), whole.judge(pictures, ["is it ?"])
    )
    prompts, instruction = ["a knife"], "rewrite {prompt}"
    assert spread.rewrite(prompts, instruction) == whole.rewrite(prompts, instruction)


def test_layers_go_evenly_and_in_order_and_all_else_to_the_first(tmp_path: Path) -> None:
    place = spread_map(Emu3ForConditionalGeneration, emu3(tmp_path), devices=[0, 1])
    layers = {name: device for name, device in place.items() if ".layers." in name}
    assert list(layers.values()) == sorted([0] * (len(layers) // 2) + [1] * (len(layers) // 2))
    assert {device for name, device in place.items() if name not in layers} == {0}
    assert {"model.vqmodel", "lm_head", "model.text_model.embed_tokens"} <= set(place)


def test_refusals_say_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sees 1; raise execution\.gpus_per_actor"):
        spread_map(Emu3ForConditionalGeneration, emu3(tmp_path), devices=[0])
    with pytest.raises(UserError, match="serves the emu3 and chameleon families"):
        load_model(ModelConfig(device="spread"))
