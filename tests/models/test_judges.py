"""Does any judge serve any generator: another family, or a vision-language model?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from isic_ray.config.run import JudgeConfig, ModelConfig
from isic_ray.errors import UserError
from isic_ray.models.base import Judge
from isic_ray.models.families.vision_language import VisionLanguageJudge
from isic_ray.models.registry import digest_judge, load_generator_and_judge, load_judge, load_model
from tests.tiny_checkpoints import chameleon, emu3, llamagen, llava

QUESTIONS = ["is there a knife ?", "dog ?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judges")


@pytest.fixture(scope="module")
def generator(folder: Path) -> Path:
    return llamagen(folder / "llamagen")


@pytest.fixture(scope="module")
def vlm(folder: Path) -> Path:
    return llava(folder / "llava")


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 48, 48, 3), dtype=np.uint8)


def test_a_vision_language_model_judges_as_stock_does(vlm: Path) -> None:
    judge = load_judge(ModelConfig(str(vlm), device="cpu"))
    assert isinstance(judge, VisionLanguageJudge)
    assert judge.weights_digest == digest_judge(str(vlm))
    stock, processor = (
        LlavaForConditionalGeneration.from_pretrained(vlm),
        LlavaProcessor.from_pretrained(vlm),
    )
    words = processor.tokenizer.get_vocab()
    found = judge.judge(pictures(3), QUESTIONS)
    for i, image in enumerate(pictures(3)):
        for q, question in enumerate(QUESTIONS):
            inputs = processor(
                text=f"<image> {question} ", images=Image.fromarray(image), return_tensors="pt"
            )
            with torch.no_grad():
                logits = stock(**inputs).logits[0, -1]
            expected = logits[[words["yes"], words["no"]]].softmax(0)[0]
            torch.testing.assert_close(found[i, q], expected, atol=1e-5, rtol=1e-4)
    assert found.std() > 1e-3


@pytest.mark.parametrize("build", [emu3, chameleon])
def test_another_family_judges(generator: Path, folder: Path, build: object) -> None:
    name = str(build(folder / build.__name__))  # type: ignore[operator, attr-defined]
    model, judge = load_generator_and_judge(ModelConfig(str(generator), device="cpu"), name)
    alone = load_model(ModelConfig(name))
    drawn = model.decode(torch.zeros(2, model.tokens_per_image, dtype=torch.int32))
    assert torch.equal(judge.judge(drawn, QUESTIONS), alone.judge(drawn, QUESTIONS))
    assert judge.rewrite(["a knife"], "rewrite : {prompt}") == alone.rewrite(
        ["a knife"], "rewrite : {prompt}"
    )
    assert judge.weights_digest == digest_judge(name) == alone.weights_digest
    assert (model.family, model.weights_digest) == (
        "llamagen",
        load_model(ModelConfig(str(generator))).weights_digest,
    )


def test_a_generator_that_judges_by_itself_is_both() -> None:
    model, judge = load_generator_and_judge(ModelConfig())
    assert judge is model


def test_pictures_may_have_their_own_questions(vlm: Path) -> None:
    judge = load_judge(ModelConfig(str(vlm), device="cpu"))
    assert isinstance(judge, Judge)
    whole = judge.judge(pictures(3), QUESTIONS).tolist()
    assert judge.judge_each(pictures(3), [QUESTIONS, [], QUESTIONS[1:]]) == [
        whole[0],
        [],
        whole[2][1:],
    ]


def test_the_embedded_model_judges_any_size(generator: Path) -> None:
    _, judge = load_generator_and_judge(ModelConfig(str(generator), device="cpu"), "pictogram")
    assert judge.judge(pictures(2), list(JudgeConfig().questions.values())).shape == (2, 2)


def test_what_cannot_judge_is_refused(folder: Path, generator: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        load_judge(ModelConfig(str(llava(folder / "mute", template=False)), device="cpu"))
    text_only = folder / "text"
    text_only.mkdir()
    (text_only / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"judge\.model"):
        load_judge(ModelConfig(str(text_only), device="cpu"))
