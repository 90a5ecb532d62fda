"""Does the fine-tune see a picture as the judge does, and does its loss move rows to that end?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isic_ray.codebook.finetune import HarmlessDelta, feature_difference, loss
from isic_ray.config.run import ModelConfig
from isic_ray.models.base import SamplingSettings, SeesPixels, UnifiedModel
from isic_ray.models.registry import load_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> UnifiedModel:
    return load_model(ModelConfig(name="pictogram"))


def test_the_perceiver_sees_what_the_judge_sees(model: UnifiedModel) -> None:
    assert isinstance(model, SeesPixels)
    picture = np.random.default_rng(0).integers(0, 256, (1, 48, 48, 3), dtype=np.uint8)
    inputs = model.processor.image_processor(images=list(picture), return_tensors="pt")[
        "pixel_values"
    ]
    with torch.no_grad():
        expected = model.model.model.vision_model(inputs).last_hidden_state
        seen = model.perceiver()(torch.from_numpy(picture).permute(0, 3, 1, 2) / 127.5 - 1)
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)


def test_other_sizes_are_brought_to_the_towers(model: UnifiedModel) -> None:
    assert isinstance(model, SeesPixels)
    assert model.perceiver()(torch.zeros(2, 3, 96, 96)).shape[:2] == (2, 36)


def test_feature_difference_is_relative() -> None:
    wanted, seen = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    assert float(feature_difference(wanted, wanted)) == 0
    torch.testing.assert_close(
        feature_difference(10 * seen, 10 * wanted), feature_difference(seen, wanted)
    )


def test_steps_down_the_feature_loss_bring_a_picture_nearer_for_the_judge(
    model: UnifiedModel,
) -> None:
    assert isinstance(model, SeesPixels)
    tokens = model.sample(
        ["a knife on the beach", "a spoon on the beach"], [1, 1], SamplingSettings(1.5, 0.0)
    )
    renderer, perceiver, base = model.renderer(), model.perceiver(), model.codebook
    with torch.no_grad():
        target = perceiver(renderer(tokens[1:], base))
    used = torch.zeros(len(base), dtype=torch.bool)
    used[tokens[0].long()] = True
    module = HarmlessDelta(base, None, used, normalised=True)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.06)
    values = []
    for _ in range(6):
        value = loss(renderer, module, tokens[:1], target, 0.0, perceiver)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]
    assert all(parameter.grad is None for parameter in perceiver.parameters())
