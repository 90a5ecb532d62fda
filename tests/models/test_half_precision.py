"""Does every family work in bfloat16, around a master table of the file's precision?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isic_ray.config.run import ModelConfig
from isic_ray.models.base import SamplingSettings
from isic_ray.models.registry import load_model, read_spec
from tests.tiny_checkpoints import chameleon, emu3, llamagen, vila_u


@pytest.mark.parametrize("build", [emu3, chameleon, llamagen, vila_u])
def test_it_works_around_a_float32_master_table(
    build: Callable[[Path], Path], tmp_path: Path
) -> None:
    name = str(build(tmp_path))
    model = load_model(ModelConfig(name, dtype="bfloat16", device="cpu"))
    assert model.codebook.dtype == torch.float32
    assert torch.equal(model.codebook, read_spec(ModelConfig(name)).codebook)
    tokens = model.sample(["a red cat", "knife"], [0, 1], SamplingSettings(guidance=3.0))
    pictures = model.decode(tokens)
    assert model.encode(pictures).shape == tokens.shape
    if build is not llamagen:
        scores = model.judge(pictures, ["is there a knife ?"])
        assert scores.isfinite().all()
        assert scores.dtype == torch.float32
    pixels = model.renderer()(tokens, model.codebook)
    assert pixels.dtype == torch.float32
