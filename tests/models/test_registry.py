"""Does every refusal to choose an adapter say why?"""

from __future__ import annotations

import pytest

from isic_ray.config.run import ModelConfig
from isic_ray.errors import UserError
from isic_ray.models.checkpoints import resolve_device, resolve_dtype
from isic_ray.models.registry import load_model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(name="/nowhere/at all"), "neither a directory nor a hub name"),
        (ModelConfig(name="showlab/show-o-512x512"), "no codebook table to edit"),
        (ModelConfig(name="ByteDance-Seed/BAGEL-7B-MoT"), "continuous latent"),
        (ModelConfig(name="x", family="infinity"), "bitwise"),
        (ModelConfig(name="zai-org/GLM-Image"), "diffusion decoder"),
        (ModelConfig(name="x", family="emu9"), "known families: janus"),
    ],
)
def test_registry_refuses_clearly(config: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(config)


def test_dtype_and_device_are_checked() -> None:
    with pytest.raises(UserError, match=r"model\.dtype 'int3'"):
        resolve_dtype("int3")
    with pytest.raises(UserError, match=r"model\.device 'toaster'"):
        resolve_device("toaster")
