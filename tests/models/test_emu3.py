"""Is the Emu3 adapter what stock transformers is? On a small random checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Emu3ForConditionalGeneration, Emu3Processor

from isic_ray.codebook import ArtifactMeta, SafeCodebook
from isic_ray.config.run import ModelConfig
from isic_ray.models.base import SamplingSettings, UnifiedModel
from isic_ray.models.families.emu3 import NEGATIVE_PROMPT, Emu3Model
from isic_ray.models.registry import load_model, read_spec
from isic_ray.testing import UnifiedModelConformance
from tests.tiny_checkpoints import EMU3_CODES, EMU3_SIDE, emu3

PROMPTS = ["a red cat", "a blue dog on the table with a knife", "knife"]
TOKENS = EMU3_SIDE**2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emu3(tmp_path_factory.mktemp("emu3"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> UnifiedModel:
    return load_model(ModelConfig(str(checkpoint), device="cpu"))


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> Emu3ForConditionalGeneration:
    return Emu3ForConditionalGeneration.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Emu3Processor:
    return Emu3Processor.from_pretrained(checkpoint)


class TestEmu3(UnifiedModelConformance):
    pass


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def tokens(count: int) -> Tensor:
    return torch.randint(
        0,
        EMU3_CODES,
        (count, TOKENS),
        generator=torch.Generator().manual_seed(1),
        dtype=torch.int32,
    )


def published(
    stock: Emu3ForConditionalGeneration, processor: Emu3Processor, guidance: float
) -> Tensor:
    """Draw by the published procedure with stock `generate`.

    Each row of visual tokens ends with a separator, and three closing words follow the last.
    """
    area = {
        "ratio": "1:1",
        "image_area": 32 * 32,
        "return_tensors": "pt",
        "return_for_image_generation": True,
    }
    inputs = processor(text=PROMPTS, padding=True, **area)
    negative = processor(text=[NEGATIVE_PROMPT] * len(PROMPTS), padding=True, **area)
    height, width = inputs.pop("image_sizes")[0]
    vocabulary, words = stock.config.vocabulary_map, stock.vocabulary_mapping.image_tokens
    closing = [vocabulary[word] for word in ("<|extra_201|>", "<|image end|>", "<|extra_204|>")]

    def allowed(batch: int, ids: Tensor) -> list[int]:
        start = int((ids == vocabulary["<|image token|>"]).nonzero()[0])
        offset = len(ids) - start
        if offset > (width + 1) * height:
            return [closing[min(offset - (width + 1) * height, 3) - 1]]
        return [vocabulary["<|extra_200|>"]] if offset % (width + 1) == 0 else words

    length = inputs["input_ids"].shape[1]
    drawn = stock.generate(
        **inputs,
        max_new_tokens=(width + 1) * height + 3,
        do_sample=False,
        guidance_scale=guidance,
        prefix_allowed_tokens_fn=allowed,
        negative_prompt_ids=negative["input_ids"],
        negative_prompt_attention_mask=negative["attention_mask"],
    )[:, length:]
    return stock.vocabulary_mapping.convert_bpe2img(
        drawn[:, :-3].view(-1, height, width + 1)
    ).flatten(1)


@pytest.mark.parametrize("guidance", [2.0, 5.0])
def test_greedy_tokens_equal_the_published_procedure(
    model: UnifiedModel,
    stock: Emu3ForConditionalGeneration,
    processor: Emu3Processor,
    guidance: float,
) -> None:
    expected = published(stock, processor, guidance)
    found = model.sample(PROMPTS, [0, 1, 2], SamplingSettings(guidance=guidance, temperature=0))
    assert torch.equal(found.long(), expected.long())
    assert len(found.unique()) > 3


def test_decode_equals_stock_with_the_table_replaced(
    model: UnifiedModel, stock: Emu3ForConditionalGeneration
) -> None:
    edited = model.codebook + torch.randn(
        model.codebook.shape, generator=torch.Generator().manual_seed(2)
    )
    table = stock.model.vqmodel.quantize.embedding.weight
    original = table.detach().clone()
    with torch.no_grad():
        table.copy_(edited)
        pixels = stock.model.vqmodel.decode(tokens(3).view(3, EMU3_SIDE, EMU3_SIDE).long())
        table.copy_(original)
    expected = ((pixels + 1) / 2 * 255).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    found = model.decode(tokens(3), edited)
    assert np.abs(found - expected).max() <= 1
    assert (found == expected).mean() > 0.99


def test_encode_equals_stock(
    model: UnifiedModel, stock: Emu3ForConditionalGeneration, processor: Emu3Processor
) -> None:
    images = pictures(5)
    inputs = processor.image_processor(images=list(images), return_tensors="pt")
    with torch.no_grad():
        found = stock.model.vqmodel.encode(
            inputs["pixel_values"], inputs["image_sizes"], return_dict=True
        ).image_tokens
    assert torch.equal(model.encode(images).long(), torch.stack(list(found)).flatten(1))


def test_judge_equals_a_stock_forward(
    model: UnifiedModel, stock: Emu3ForConditionalGeneration, processor: Emu3Processor
) -> None:
    images, questions = pictures(3), ["is there a knife ?", "dog ?"]
    found = model.judge(images, questions)
    words = stock.config.vocabulary_map
    for q, question in enumerate(questions):
        chat = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        ]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        for i, image in enumerate(images):
            inputs = processor(text=[text], images=[image], return_tensors="pt")
            with torch.no_grad():
                logits = stock(**inputs).logits[0, -1]
            torch.testing.assert_close(
                found[i, q], logits[[words["yes"], words["no"]]].softmax(0)[0], atol=1e-5, rtol=1e-4
            )
    assert found.std() > 1e-3


def test_the_spec_is_read_from_the_files(model: UnifiedModel, checkpoint: Path) -> None:
    spec = read_spec(ModelConfig(str(checkpoint)))
    assert (spec.family, spec.weights_digest) == ("emu3", model.weights_digest)
    assert torch.equal(spec.codebook, model.codebook)


def test_the_export_loads_in_stock_transformers(checkpoint: Path, tmp_path: Path) -> None:
    ours = Emu3Model.from_pretrained(str(checkpoint), device="cpu")
    edited = ours.codebook.clone()
    edited[3] += 1
    ours.export(
        SafeCodebook.from_tables(ours.codebook, edited, ArtifactMeta("test", "emu3")), tmp_path
    )
    again = Emu3ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.model.vqmodel.quantize.embedding.weight, edited)
    Emu3Processor.from_pretrained(tmp_path)
