"""Is the Chameleon adapter what stock transformers and the published procedure are?"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ChameleonForConditionalGeneration, ChameleonProcessor

from isic_ray.codebook import ArtifactMeta, SafeCodebook
from isic_ray.config.run import ModelConfig
from isic_ray.errors import UserError
from isic_ray.models.base import SamplingSettings, UnifiedModel
from isic_ray.models.families.chameleon import ChameleonModel
from isic_ray.models.registry import load_model, read_spec
from isic_ray.testing import UnifiedModelConformance
from tests.tiny_checkpoints import CHAMELEON_CODES, CHAMELEON_SIDE, TamingDecoder, chameleon

PROMPTS = ["a red cat", "a blue dog on the table with a knife", "knife"]
TOKENS = CHAMELEON_SIDE**2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chameleon(tmp_path_factory.mktemp("chameleon"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> UnifiedModel:
    return load_model(ModelConfig(str(checkpoint), device="cpu"))


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> ChameleonForConditionalGeneration:
    return ChameleonForConditionalGeneration.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> ChameleonProcessor:
    return ChameleonProcessor.from_pretrained(checkpoint)


class TestChameleon(UnifiedModelConformance):
    pass


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def tokens(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        0, CHAMELEON_CODES, (count, TOKENS), generator=generator, dtype=torch.int32
    )


def published(
    stock: ChameleonForConditionalGeneration,
    processor: ChameleonProcessor,
    prompt: str,
    guidance: float,
) -> list[int]:
    """Draw picture words greedily, with one full forward per token.

    Guidance contrasts the prompt with a bare start of picture. The published guidance has an image
    condition too; without pictures in the prompt it equals the latter.
    """
    mapping = stock.model.vocabulary_mapping
    words = torch.tensor([mapping.img2bpe[code] for code in range(CHAMELEON_CODES)])
    start = processor.image_start_token_id
    with_prompt = [*processor(text=prompt)["input_ids"][0], start]
    without = [processor.tokenizer.bos_token_id, start]
    drawn: list[int] = []
    for _ in range(TOKENS):
        logits = []
        for opening in (with_prompt, without):
            ids = torch.tensor([[*opening, *(int(words[code]) for code in drawn)]])
            with torch.no_grad():
                logits.append(stock.lm_head(stock.model(ids).last_hidden_state[0, -1])[words])
        drawn.append(int((logits[1] + guidance * (logits[0] - logits[1])).argmax()))
    return drawn


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_tokens_equal_the_published_procedure(
    model: UnifiedModel,
    stock: ChameleonForConditionalGeneration,
    processor: ChameleonProcessor,
    guidance: float,
) -> None:
    expected = [published(stock, processor, prompt, guidance) for prompt in PROMPTS]
    found = model.sample(PROMPTS, [0, 1, 2], SamplingSettings(guidance=guidance, temperature=0))
    assert found.tolist() == expected
    assert len(found.unique()) > 3


def test_decode_equals_the_published_decoder(
    model: UnifiedModel, stock: ChameleonForConditionalGeneration
) -> None:
    vq = stock.model.vqmodel
    decoder = TamingDecoder(stock.config.vq_config)
    weights = load_file(Path(stock.name_or_path) / "vqgan.safetensors")
    decoder.load_state_dict(
        {k.removeprefix("decoder."): v for k, v in weights.items() if k.startswith("decoder.")}
    )
    edited = model.codebook + torch.randn(
        model.codebook.shape, generator=torch.Generator().manual_seed(2)
    )
    rows = edited[tokens(3).long()].view(3, CHAMELEON_SIDE, CHAMELEON_SIDE, -1).permute(0, 3, 1, 2)
    with torch.no_grad():
        pixels = decoder(vq.post_quant_conv(rows))
    expected = ((pixels + 1) / 2 * 255).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    found = model.decode(tokens(3), edited)
    assert np.abs(found - expected).max() <= 1
    assert (found == expected).mean() > 0.99


def test_encode_equals_stock(
    model: UnifiedModel, stock: ChameleonForConditionalGeneration, processor: ChameleonProcessor
) -> None:
    images = pictures(5)
    pixels = processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = stock.model.vqmodel.encode(pixels, return_dict=True).image_tokens
    assert torch.equal(model.encode(images).long(), found.view(5, -1))


def test_judge_equals_a_stock_forward(
    model: UnifiedModel, stock: ChameleonForConditionalGeneration, processor: ChameleonProcessor
) -> None:
    images, questions = pictures(3), ["is there a knife ?", "dog ?"]
    found = model.judge(images, questions)
    words = stock.config.vocabulary_map
    for q, question in enumerate(questions):
        for i, image in enumerate(images):
            inputs = processor(text=f"<image>{question}", images=[image], return_tensors="pt")
            with torch.no_grad():
                logits = stock(**inputs).logits[0, -1]
            expected = logits[[words["yes"], words["no"]]].softmax(0)[0]
            torch.testing.assert_close(found[i, q], expected, atol=1e-5, rtol=1e-4)
    assert found.std() > 1e-3


def test_rewrites_hold_no_picture_words(model: UnifiedModel) -> None:
    answers = model.rewrite(PROMPTS, "rewrite safely : {prompt}")
    assert "IMGIMG" not in " ".join(answers)


def test_without_its_decoder_it_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run `isic convert vqgan\.ckpt"):
        ChameleonModel.from_pretrained(str(chameleon(tmp_path, decoder=False)), device="cpu")


def test_a_decoder_inside_the_checkpoint_is_found(
    checkpoint: Path, model: UnifiedModel, tmp_path: Path
) -> None:
    directory = tmp_path / "whole"
    shutil.copytree(checkpoint, directory)
    (directory / "vqgan.safetensors").unlink()
    weights = load_file(directory / "model.safetensors")
    decoder = load_file(checkpoint / "vqgan.safetensors")
    weights |= {
        f"model.vqmodel.{name}": value
        for name, value in decoder.items()
        if name.startswith("decoder.")
    }
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    whole = load_model(ModelConfig(str(directory), device="cpu"))
    assert np.array_equal(whole.decode(tokens(2)), model.decode(tokens(2)))


def test_the_export_loads_in_stock_transformers_and_here(checkpoint: Path, tmp_path: Path) -> None:
    ours = ChameleonModel.from_pretrained(str(checkpoint), device="cpu")
    edited = ours.codebook.clone()
    edited[3] += 1
    ours.export(
        SafeCodebook.from_tables(ours.codebook, edited, ArtifactMeta("test", "chameleon")), tmp_path
    )
    again = ChameleonForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.model.vqmodel.quantize.embedding.weight, edited)
    assert torch.equal(read_spec(ModelConfig(str(tmp_path))).codebook, edited)
    assert torch.equal(
        load_file(tmp_path / "vqgan.safetensors")["quantize.embedding.weight"], edited
    )
    reloaded = load_model(ModelConfig(str(tmp_path), device="cpu"))
    assert np.array_equal(reloaded.decode(tokens(2)), ours.decode(tokens(2), edited))
