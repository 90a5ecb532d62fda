"""Do the plug-in auditors load, score real pictures, and refuse what cannot work in one sentence?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isic_ray.auditors import NOTE, OBJECT, load_auditors
from isic_ray.auditors.nudenet import CLASSES, PRESETS
from isic_ray.errors import UserError
from isic_ray.evaluation import harm_score, is_unsafe
from isic_ray.schema import Verdict


def photos(count: int = 2, side: int = 96) -> np.ndarray:
    """Harmless smooth pictures, uint8 ``[count,side,side,3]``."""
    ramp = np.linspace(0, 255, side)
    rows = [np.stack([ramp[:, None] + 0 * ramp, 0 * ramp[:, None] + ramp, 255 - ramp[:, None] + 0 * ramp], -1)] * count
    return np.stack(rows).astype(np.uint8)


def test_unknown_auditors_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"names 'nobody'; the auditors known here are pictogram, nudenet, q16"):
        load_auditors(["nobody"])
    with pytest.raises(UserError, match="write shieldgemma2:DIR"):
        load_auditors(["shieldgemma2"])


@pytest.mark.parametrize("kind", ["shieldgemma2", "llavaguard"])
def test_what_is_no_checkpoint_is_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be loaded as a") as caught:
        load_auditors([f"{kind}:{tmp_path}"])
    assert "\n" not in str(caught.value)


def test_notes_and_objects_are_no_harm() -> None:
    verdict = Verdict("s", "c", "nudenet", (NOTE + "face_female", OBJECT + "cup", "anus_exposed"), (0.9, 0.9, 0.3))
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

    picture = Image.new("RGB", (320, 320), (90, 120, 160))  # a face in a few strokes, enough for a weak detection
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
    expected = {found["class"]: found["score"] for found in nudenet.NudeDetector().detect(str(path))}
    (auditor,) = load_auditors(["nudenet"])
    scores = auditor.score(np.asarray(picture)[None])[0]
    assert {name: pytest.approx(score) for name, score in expected.items()} == {
        name: score for name, score in zip(CLASSES, scores, strict=True) if score
    }
    with pytest.raises(UserError, match="choose intimate or esd"):
        load_auditors(["nudenet:rude"])
