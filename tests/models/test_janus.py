"""Is the Janus adapter what stock transformers is? On a small random checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from isic_ray.config.run import ModelConfig
from isic_ray.errors import UserError
from isic_ray.models.base import Judge, SamplingSettings, UnifiedModel
from isic_ray.models.decoding.asking import answer_ids, yes_share
from isic_ray.models.families.janus import JanusModel
from isic_ray.models.registry import load_model
from tests.tiny_checkpoints import JANUS_CODES, JANUS_SIDE, JANUS_TOKENS, janus_word, tiny_janus

PROMPTS = [
    "a red cat",
    "a blue dog on the table with a knife and a cat of the red dog and the blue cat",
    "knife",
]
QUESTIONS = ["is there a knife ?", "is the cat red ?", "dog ?"]


@pytest.fixture(scope="module")
def janus() -> JanusModel:
    return tiny_janus()


@pytest.fixture(scope="module")
def checkpoint(janus: JanusModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    janus.model.save_pretrained(directory)
    janus.processor.save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(
        0, 256, (count, JANUS_SIDE, JANUS_SIDE, 3), dtype=np.uint8
    )


def tokens(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        0, JANUS_CODES, (count, JANUS_TOKENS), generator=generator, dtype=torch.int32
    )


def stock_inputs(janus: JanusModel) -> dict[str, Tensor]:
    chats = [
        [{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in PROMPTS
    ]
    texts = [
        janus.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats
    ]
    return dict(
        janus.processor(
            text=texts,
            generation_mode="image",
            padding=True,
            add_special_tokens=False,
            return_tensors="pt",
        )
    )


def stock_generate(
    model: JanusForConditionalGeneration, inputs: dict[str, Tensor], guidance: float
) -> Tensor:
    return model.generate(
        **inputs, generation_mode="image", do_sample=False, guidance_scale=guidance
    )


def test_is_a_unified_model(janus: JanusModel) -> None:
    assert isinstance(janus, UnifiedModel)
    assert janus.codebook.shape == (JANUS_CODES, 8)
    assert (janus.tokens_per_image, janus.normalised, janus.tokens_depend_on_codebook) == (
        JANUS_TOKENS,
        True,
        False,
    )


@pytest.mark.parametrize("guidance", [2.0, 5.0])
def test_greedy_equals_stock_generate(janus: JanusModel, guidance: float) -> None:
    expected = stock_generate(janus.model, stock_inputs(janus), guidance)
    found = janus.sample(PROMPTS, [0, 1, 2], SamplingSettings(guidance=guidance, temperature=0))
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), expected)
    assert len(found.unique()) > 3


def test_samples_do_not_depend_on_the_batch(janus: JanusModel) -> None:
    prompts, seeds = PROMPTS * 7, list(range(21))
    whole = janus.sample(prompts, seeds, SamplingSettings(guidance=3.0))
    for size in (1, 7):
        parts = [
            janus.sample(prompts[i : i + size], seeds[i : i + size], SamplingSettings(guidance=3.0))
            for i in range(0, 21, size)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_prompt_beyond_the_context_is_refused(janus: JanusModel) -> None:
    with pytest.raises(UserError, match="has room for"):
        janus.sample(["cat " * 200], [0], SamplingSettings())


@pytest.mark.parametrize("count", [1, 4, 11])
def test_decode_equals_stock_with_the_table_replaced(janus: JanusModel, count: int) -> None:
    edited = janus.codebook + torch.randn(
        janus.codebook.shape, generator=torch.Generator().manual_seed(2)
    )
    drawn = tokens(12)
    table = janus.model.model.vqmodel.quantize.embedding.weight
    original = table.detach().clone()
    with torch.no_grad():
        table.copy_(edited)
        stock = (janus.model.decode_image_tokens(drawn.long()) + 1) / 2 * 255
        table.copy_(original)
    expected = stock.round().clamp(0, 255).to(torch.uint8).numpy()
    found = janus.decode(drawn[:count], edited)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected[:count])
    assert not np.array_equal(found, janus.decode(drawn[:count]))
    assert torch.equal(table, original)


def test_decode_refuses_what_does_not_fit(janus: JanusModel) -> None:
    with pytest.raises(ValueError, match="codebook"):
        janus.decode(tokens(1), janus.codebook[:-1])
    with pytest.raises(ValueError, match="expected"):
        janus.decode(tokens(1)[:, :-1])
    with pytest.raises(ValueError, match="must be in"):
        janus.decode(tokens(1) + JANUS_CODES)
    assert janus.decode(tokens(0)).shape == (0, JANUS_SIDE, JANUS_SIDE, 3)


def test_encode_takes_the_row_of_greatest_cosine(janus: JanusModel) -> None:
    images = pictures(9)
    found = janus.encode(images)
    vq = janus.model.model.vqmodel
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        z = vq.quant_conv(vq.encoder(pixels)).permute(0, 2, 3, 1).reshape(9, JANUS_TOKENS, 8)
    cosine = torch.nn.functional.cosine_similarity(z[:, :, None], janus.codebook, dim=-1)
    best = cosine.gather(2, found.long()[..., None]).squeeze(2)
    torch.testing.assert_close(best, cosine.amax(2))
    assert torch.equal(janus.encode(images[4:5]), found[4:5])
    with pytest.raises(ValueError, match="expected"):
        janus.encode(images[:, :16])


def test_judge_equals_a_stock_forward(janus: JanusModel) -> None:
    images = pictures(3)
    found = janus.judge(images, QUESTIONS)
    yes, no = janus_word("yes"), janus_word("no")
    for q, question in enumerate(QUESTIONS):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = janus.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        for i, image in enumerate(images):
            inputs = janus.processor(
                text=[text], images=[image], add_special_tokens=False, return_tensors="pt"
            )
            logits = janus.model(**inputs).logits[0, -1]
            torch.testing.assert_close(
                found[i, q], logits[[yes, no]].softmax(0)[0], atol=1e-5, rtol=1e-4
            )


def test_judge_ignores_batch_and_other_questions(janus: JanusModel) -> None:
    images = pictures(20)
    whole = janus.judge(images, QUESTIONS)
    assert whole.shape == (20, 3)
    assert whole.std() > 0.005
    for q, question in enumerate(QUESTIONS):
        assert torch.equal(janus.judge(images, [question])[:, 0], whole[:, q])
    assert torch.equal(janus.judge(images[18:], QUESTIONS), whole[18:])


def test_pictures_may_have_their_own_questions(janus: JanusModel) -> None:
    images = pictures(21)
    own = [QUESTIONS[i % 3 :] + QUESTIONS[: i % 2] for i in range(21)]
    found = janus.judge_each(images, own)
    whole = janus.judge(images, QUESTIONS)
    for i, asked in enumerate(own):
        assert found[i] == [whole[i, QUESTIONS.index(question)].item() for question in asked]
    assert OneByOne(janus).judge_each(images, own) == found
    assert janus.judge_each(images[:2], [[], QUESTIONS[:1]]) == [[], [whole[1, 0].item()]]


def test_an_answer_does_not_depend_on_its_place_among_others() -> None:
    """A CPU computes the last numbers of a tensor by other instructions than the rest."""
    logits = 3 * torch.randn(2000, 6, generator=torch.Generator().manual_seed(0))
    alone = [yes_share(row[None], [0, 2], [1, 3, 5]) for row in logits]
    assert torch.equal(yes_share(logits, [0, 2], [1, 3, 5]), torch.cat(alone))


class OneByOne(Judge):
    """A judge that asks about each question by itself."""

    def __init__(self, janus: JanusModel) -> None:
        self.janus = janus

    def judge(self, images: np.ndarray, questions: Sequence[str]) -> Tensor:
        return self.janus.judge(images, questions)


def test_judge_needs_one_token_answers() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
        unk_token="<unk>",
    )
    with pytest.raises(UserError, match="no single token for 'yes'"):
        answer_ids(tokenizer, "yes")


def test_without_a_chat_template() -> None:
    janus, cat = tiny_janus(template=None), janus_word("cat")
    assert janus.drawing_ids("cat") == [1, cat, 4]
    before, after = janus._question_ids("cat ?")
    assert before == [1, 4, *[6] * JANUS_TOKENS, 5]
    assert after[0] == cat


def test_rewrite_stops_at_eos(janus: JanusModel) -> None:
    instruction = "the {prompt} :"
    free = [text.split() for text in janus.rewrite(PROMPTS, instruction)]
    which, cut = next(
        (i, at) for i, words in enumerate(free) for at, word in enumerate(words) if word != words[0]
    )
    generation = janus.model.generation_config
    generation.eos_token_id = [2, janus_word(free[which][cut])]
    try:
        stopped = janus.rewrite(PROMPTS, instruction)
        text = f"<s> {instruction.format(prompt=PROMPTS[which])}"
        inputs = janus.processor(text=[text], return_tensors="pt")
        stock = janus.model.generate(
            **inputs, generation_mode="text", do_sample=False, max_new_tokens=96
        )
    finally:
        generation.eos_token_id = 2
    assert stopped[which].split() == free[which][:cut]
    new = stock[0, inputs["input_ids"].shape[1] : -1]
    assert stopped[which] == janus.processor.tokenizer.decode(new, skip_special_tokens=True)


def test_renderer_gradients_reach_only_the_rows_used(janus: JanusModel) -> None:
    renderer, drawn = janus.renderer().train(), tokens(2)
    codebook = janus.codebook.clone().requires_grad_(True)
    pixels = renderer(drawn, codebook)
    assert pixels.shape == (2, 3, JANUS_SIDE, JANUS_SIDE)
    pixels.square().mean().backward()
    assert codebook.grad is not None
    used = torch.zeros(JANUS_CODES, dtype=torch.bool)
    used[drawn.unique().long()] = True
    assert torch.equal(codebook.grad.abs().sum(1) > 0, used)
    assert all(
        parameter.grad is None and not parameter.requires_grad
        for parameter in renderer.parameters()
    )
    levels = (
        ((pixels.detach() + 1) / 2 * 255)
        .round()
        .clamp(0, 255)
        .permute(0, 2, 3, 1)
        .to(torch.uint8)
        .numpy()
    )
    assert np.abs(levels.astype(int) - janus.decode(drawn).astype(int)).max() <= 1


def test_loading_leaves_the_progress_bars_of_transformers_as_they_are(checkpoint: Path) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    try:
        for setting in (logging.enable_progress_bar, logging.disable_progress_bar):
            setting()
            enabled = logging.is_progress_bar_enabled()
            load_model(ModelConfig(name=str(checkpoint), device="cpu"))
            assert logging.is_progress_bar_enabled() == enabled
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_checkpoint_round_trip(janus: JanusModel, checkpoint: Path) -> None:
    loaded = load_model(ModelConfig(name=str(checkpoint), device="cpu"))
    assert isinstance(loaded, JanusModel)
    assert len(loaded.weights_digest) == 64
    settings = SamplingSettings(guidance=3.0)
    assert torch.equal(
        loaded.sample(PROMPTS, [0, 1, 2], settings), janus.sample(PROMPTS, [0, 1, 2], settings)
    )
    assert torch.equal(loaded.codebook, janus.codebook)
    stock = JanusForConditionalGeneration.from_pretrained(
        checkpoint
    )  # the reload keeps boi_token_id
    expected = stock_generate(janus.model, stock_inputs(janus), 3.0)
    assert torch.equal(stock_generate(stock, stock_inputs(janus), 3.0), expected)


def test_codebook_master_keeps_the_precision_of_the_file(
    janus: JanusModel, checkpoint: Path
) -> None:
    loaded = JanusModel.from_pretrained(str(checkpoint), dtype="bfloat16", device="cpu")
    assert loaded.model.dtype == torch.bfloat16
    assert torch.equal(loaded.codebook, janus.codebook)
    assert loaded.sample(PROMPTS, [0, 1, 2], SamplingSettings()).shape == (3, JANUS_TOKENS)


def break_checkpoint(directory: Path, how: str) -> None:
    config = directory / "config.json"
    if how == "no config":
        config.unlink()
    elif how == "bad config":
        config.write_text("{")
    elif how == "other model":
        config.write_text(json.dumps({"model_type": "llama"}))
    elif how == "no type":
        config.write_text("{}")
    elif how == "no weights":
        (directory / "model.safetensors").unlink()
    elif how == "torn weights":
        data = (directory / "model.safetensors").read_bytes()
        (directory / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif how == "no processor":
        for path in directory.glob("*token*"):
            path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "no config.json"),
        ("bad config", "not valid JSON"),
        ("other model", "model_type is 'llama'"),
        ("no type", "names no model_type"),
        ("no weights", "no model.safetensors"),
        ("torn weights", "is cut short"),
        ("no processor", "no usable JanusProcessor"),
    ],
)
def test_broken_checkpoints_give_one_sentence(
    checkpoint: Path, tmp_path: Path, how: str, message: str
) -> None:
    directory = tmp_path / "broken"
    shutil.copytree(checkpoint, directory)
    break_checkpoint(directory, how)
    with pytest.raises(UserError, match=message) as caught:
        JanusModel.from_pretrained(str(directory), device="cpu")
    assert "\n" not in str(caught.value)
