"""Do the auditors load, score real pictures, and refuse in one sentence what cannot work?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from isic_ray.errors import UserError
from isic_ray.judges.auditors import load_auditors
from isic_ray.judges.clip import Clip
from isic_ray.judges.nudenet import CLASSES, PRESETS
from isic_ray.metrics.verdicts import harm_score, is_unsafe
from isic_ray.runs.schema import NOTE, OBJECT, Verdict
from tests import tiny_checkpoints as tiny


def photos(count: int = 2, side: int = 96) -> np.ndarray:
    """Harmless smooth pictures, uint8 ``[count,side,side,3]``."""
    ramp = np.linspace(0, 255, side)
    rows = [
        np.stack(
            [ramp[:, None] + 0 * ramp, 0 * ramp[:, None] + ramp, 255 - ramp[:, None] + 0 * ramp], -1
        )
    ] * count
    return np.stack(rows).astype(np.uint8)


def test_unknown_auditors_are_refused_by_name() -> None:
    with pytest.raises(
        UserError, match=r"names 'nobody'; the auditors known here are pictogram, nudenet, q16"
    ):
        load_auditors(["nobody"])
    with pytest.raises(UserError, match="write shieldgemma2:DIR"):
        load_auditors(["shieldgemma2"])


@pytest.mark.parametrize("kind", ["shieldgemma2", "llavaguard"])
def test_what_is_no_checkpoint_is_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be loaded as a") as caught:
        load_auditors([f"{kind}:{tmp_path}"])
    assert "\n" not in str(caught.value)


def test_notes_and_objects_are_no_harm() -> None:
    verdict = Verdict(
        "s", "c", "nudenet", (NOTE + "face_female", OBJECT + "cup", "anus_exposed"), (0.9, 0.9, 0.3)
    )
    assert harm_score(verdict) == 0.3
    assert not is_unsafe(verdict, 0.5)


def test_nudenet_scores_harmless_pictures_with_its_own_model() -> None:
    pytest.importorskip("nudenet")
    (auditor,) = load_auditors(["nudenet:esd"])
    assert auditor.name == "nudenet:esd"
    assert [name for name in auditor.questions if not name.startswith(NOTE)] == [
        name.lower() for name in CLASSES if name in PRESETS["esd"]
    ]
    scores = auditor.score(photos())
    assert scores.shape == (2, 18)
    assert scores.dtype == np.float32
    assert scores.max() < 0.5


def test_nudenet_finds_what_its_own_file_interface_finds(tmp_path: Path) -> None:
    nudenet = pytest.importorskip("nudenet")
    from PIL import Image, ImageDraw

    # A face in a few strokes, enough for a weak detection.
    picture = Image.new("RGB", (320, 320), (90, 120, 160))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((80, 50, 240, 270), fill=(224, 172, 140))
    for x in (125, 195):
        draw.ellipse((x - 18, 125, x + 18, 145), fill="white")
        draw.ellipse((x - 8, 127, x + 8, 143), fill=(60, 40, 20))
    draw.arc((125, 180, 195, 230), 20, 160, fill=(150, 40, 40), width=8)
    draw.polygon([(160, 140), (148, 190), (172, 190)], fill=(200, 150, 120))
    draw.pieslice((70, 30, 250, 200), 180, 360, fill=(60, 30, 10))
    path = tmp_path / "face.png"
    picture.save(path)
    expected = {
        found["class"]: found["score"] for found in nudenet.NudeDetector().detect(str(path))
    }
    (auditor,) = load_auditors(["nudenet"])
    scores = auditor.score(np.asarray(picture)[None])[0]
    assert {name: pytest.approx(score) for name, score in expected.items()} == {
        name: score for name, score in zip(CLASSES, scores, strict=True) if score
    }
    with pytest.raises(UserError, match="choose intimate or esd"):
        load_auditors(["nudenet:rude"])


# Vision-language and CLIP judges: the real classes of transformers, small and random


def shieldgemma2(directory: Path) -> Path:
    from transformers import (
        Gemma3TextConfig,
        ShieldGemma2Config,
        ShieldGemma2ForImageClassification,
        ShieldGemma2Processor,
        SiglipVisionConfig,
    )
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<boi>", "<eoi>", "<img>"]
    names = {"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    words = tiny.tokenizer(
        special,
        ["Yes", "No", "content", "image", "shall", "not"],
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens=names,
    )
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<boi> {% else %}{{ part['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}"
    )
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    ShieldGemma2Processor(
        images, words, chat_template=template, image_seq_length=4
    ).save_pretrained(directory)
    text = Gemma3TextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = SiglipVisionConfig(image_size=32, patch_size=8, num_attention_heads=2, **layers)
    config = ShieldGemma2Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=6,
        boi_token_index=4,
        eoi_token_index=5,
        yes_token_index=words.convert_tokens_to_ids("Yes"),
        no_token_index=words.convert_tokens_to_ids("No"),
    )
    tiny.livelier(ShieldGemma2ForImageClassification(config), 0).save_pretrained(directory)
    return directory


def clip(directory: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = tiny.tokenizer(
        ["<pad>", "</s>", "<unk>"], tiny.WORDS, pad_token="<pad>", eos_token="</s>"
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    CLIPProcessor(images, words).save_pretrained(directory)
    layers = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=16, eos_token_id=1, pad_token_id=0, **layers
    )
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **layers)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    tiny.livelier(CLIPModel(config), 0).save_pretrained(directory)
    return directory


def different(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 48, 48, 3), dtype=np.uint8)


def test_shieldgemma2_answers_each_policy(tmp_path: Path) -> None:
    (auditor,) = load_auditors([f"shieldgemma2:{shieldgemma2(tmp_path)}"])
    assert auditor.questions == ("dangerous", "sexual", "violence")
    scores = auditor.score(different())
    assert scores.shape == (3, 3)
    assert ((scores > 0) & (scores < 1)).all()
    assert len(np.unique(scores[:, 0])) == 3  # it looks at the picture
    np.testing.assert_allclose(auditor.score(different()[1:2]), scores[1:2], rtol=1e-4)


def test_llavaguard_rates_unsafe_against_safe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot tell Unsafe from Safe"):
        load_auditors([f"llavaguard:{tiny.llava(tmp_path / 'plain')}"])
    more_words = ['"Unsafe', '"Safe', '"rating":', "{"]
    directory = tiny.llava(tmp_path / "guard", more_words=more_words)
    (auditor,) = load_auditors([f"llavaguard:{directory}"])
    scores = auditor.score(different())
    assert scores.shape == (3, 1)
    assert len(np.unique(scores)) == 3
    (directory / "policy.txt").write_text("does this picture show a weapon gun knife red blue ?")
    (other,) = load_auditors([f"llavaguard:{directory}"])
    # The policy beside the checkpoint is what is asked.
    assert not np.allclose(other.score(different()), scores)


def test_q16_compares_with_its_two_prompts(tmp_path: Path) -> None:
    directory = clip(tmp_path)
    with pytest.raises(UserError, match=r"q16_prompts\.safetensors: the tensor 'prompts'"):
        load_auditors([f"q16:{directory}"])
    features = Clip(str(directory)).features(different())
    save_file({"prompts": features[:2].contiguous()}, directory / "q16_prompts.safetensors")
    (auditor,) = load_auditors([f"q16:{directory}"])
    scores = auditor.score(different())
    assert scores.shape == (3, 1)
    # Each picture is nearest to the prompt that is its own embedding.
    assert scores[0, 0] < 0.5 < scores[1, 0]


def test_clip_features_are_unit_vectors(tmp_path: Path) -> None:
    features = Clip(str(clip(tmp_path))).features(different())
    np.testing.assert_allclose(features.norm(dim=1).numpy(), 1, rtol=1e-5)
