"""Is the LlamaGen adapter what the publication says? On small random weights in its layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from isic_ray.codebook import ArtifactMeta, SafeCodebook
from isic_ray.config.run import ModelConfig
from isic_ray.errors import UserError
from isic_ray.models.base import SamplingSettings, UnifiedModel
from isic_ray.models.conversion import convert_llamagen, read_published
from isic_ray.models.registry import load_model, read_spec
from isic_ray.testing import UnifiedModelConformance
from tests import llamagen_reference as reference
from tests.tiny_checkpoints import (
    LLAMAGEN_CODES,
    LLAMAGEN_HEADS,
    LLAMAGEN_PREFIX,
    LLAMAGEN_SIDE,
    llamagen,
    llamagen_published,
)

PROMPTS = [
    "a red cat",
    "A blue dog on the table with a knife and a cat of the red dog and the cat",
    "knife",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llamagen(tmp_path_factory.mktemp("llamagen"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> UnifiedModel:
    return load_model(ModelConfig(str(checkpoint), device="cpu"))


class TestLlamaGen(UnifiedModelConformance):
    judges = False


def tokens(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        0, LLAMAGEN_CODES, (count, LLAMAGEN_SIDE**2), generator=generator, dtype=torch.int32
    )


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_greedy_tokens_equal_the_published_procedure(
    model: UnifiedModel, checkpoint: Path, guidance: float
) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    words = AutoTokenizer.from_pretrained(checkpoint / "text_encoder")(
        [prompt.lower() for prompt in PROMPTS],
        max_length=LLAMAGEN_PREFIX,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    encoder = T5EncoderModel.from_pretrained(checkpoint / "text_encoder")
    with torch.no_grad():
        states = encoder(**words).last_hidden_state
    expected = [
        reference.draw_greedily(weights, state, mask, LLAMAGEN_SIDE, LLAMAGEN_HEADS, guidance)
        for state, mask in zip(states, words["attention_mask"], strict=True)
    ]
    found = model.sample(PROMPTS, [0, 1, 2], SamplingSettings(guidance=guidance, temperature=0))
    assert found.tolist() == expected
    assert len(found.unique()) > 3


def test_decode_equals_the_published_tokenizer(model: UnifiedModel, checkpoint: Path) -> None:
    edited = model.codebook + torch.randn(
        model.codebook.shape, generator=torch.Generator().manual_seed(2)
    )
    pixels = reference.decode(
        load_file(checkpoint / "vq.safetensors"), tokens(3), edited, LLAMAGEN_SIDE
    )
    expected = ((pixels + 1) / 2 * 255).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    found = model.decode(tokens(3), edited)
    assert np.abs(found - expected).max() <= 1
    assert (found == expected).mean() > 0.99


def test_encode_equals_the_published_tokenizer(model: UnifiedModel, checkpoint: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    expected = reference.encode(load_file(checkpoint / "vq.safetensors"), pixels)
    assert torch.equal(model.encode(images).long(), expected)


def test_the_spec_is_read_from_the_files(model: UnifiedModel, checkpoint: Path) -> None:
    spec = read_spec(ModelConfig(str(checkpoint)))
    assert (spec.family, spec.weights_digest, spec.normalised) == (
        "llamagen",
        model.weights_digest,
        True,
    )
    assert torch.equal(spec.codebook, model.codebook)


def test_the_export_loads_here_and_as_published(model: UnifiedModel, tmp_path: Path) -> None:
    edited = model.codebook.clone()
    edited[3] += 1
    artifact = SafeCodebook.from_tables(model.codebook, edited, ArtifactMeta("test", "llamagen"))
    model.export(artifact, tmp_path)  # type: ignore[attr-defined]
    again = load_model(ModelConfig(str(tmp_path), device="cpu"))
    assert torch.equal(again.codebook, edited)
    assert np.array_equal(again.decode(tokens(2)), model.decode(tokens(2), edited))
    assert torch.equal(read_published(tmp_path / "vq.pt")["quantize.embedding.weight"], edited)


def test_conversion_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    published = llamagen_published(tmp_path / "published")
    gpt, vq, t5, to = published / "t2i.pt", published / "vq.pt", published / "t5", tmp_path / "to"
    with pytest.raises(UserError, match="there is no file"):
        convert_llamagen(tmp_path / "none.pt", vq, t5, to, 32)
    with pytest.raises(UserError, match="does not hold a LlamaGen text-to-image"):
        convert_llamagen(vq, vq, t5, to, 32)
    with pytest.raises(UserError, match="does not hold a LlamaGen tokenizer"):
        convert_llamagen(gpt, gpt, t5, to, 32)
    with pytest.raises(UserError, match="not the directory of a T5"):
        convert_llamagen(gpt, vq, published, to, 32)
    with pytest.raises(UserError, match="give --heads"):
        convert_llamagen(gpt, vq, t5, to, 32)


class Malicious:
    """A pickle that runs code when it is read carelessly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, (str(self.mark), "w"))  # type: ignore[return-value]


def test_a_pickle_that_runs_code_is_refused_unread(tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "bad.pt"
    torch.save({"model": {"w": torch.zeros(1)}, "trap": Malicious(mark)}, file)
    with pytest.raises(UserError, match="cannot be read safely"):
        read_published(file)
    assert not mark.exists()
