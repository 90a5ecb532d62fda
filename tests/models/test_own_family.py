"""Is the documented example of an own family found by its entry point, and does it conform?"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isic_ray.cli.main import main
from isic_ray.codebook import ArtifactMeta, SafeCodebook
from isic_ray.config.run import ModelConfig
from isic_ray.errors import UserError
from isic_ray.models.base import UnifiedModel
from isic_ray.models.registry import known_families, load_model, read_spec
from isic_ray.testing import UnifiedModelConformance

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_family.py"


def install(folder: Path, value: str) -> None:
    """What pip leaves behind of a package with that entry point."""
    info = folder / "own_family-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own_family\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[isic_ray.families]\nstripes = {value}\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(EXAMPLE, folder)
    install(folder, "own_family:FAMILY")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("own_family", None)


@pytest.fixture(scope="module")
def model(site: Path, tmp_path_factory: pytest.TempPathFactory) -> UnifiedModel:
    return load_model(ModelConfig(str(checkpoint(tmp_path_factory.mktemp("stripes")))))


def checkpoint(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "stripes"}))
    table = torch.rand(64, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    save_file({"codebook": table}, folder / "model.safetensors")
    return folder


class TestStripes(UnifiedModelConformance):
    judges = False


def test_the_example_is_short_and_documented() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    assert 'entry-points."isic_ray.families"' in EXAMPLE.read_text()


def test_the_command_line_knows_it(
    site: Path, model: UnifiedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models"]) == 0
    assert "stripes" in capsys.readouterr().out
    assert main(["doctor", "--model", str(checkpoint(tmp_path))]) == 0
    assert "64, 3" in capsys.readouterr().out


def test_its_pictures_are_read_back_and_exported(model: UnifiedModel, tmp_path: Path) -> None:
    tokens = torch.arange(16, dtype=torch.int32).view(2, 8)
    assert torch.equal(model.encode(model.decode(tokens)), tokens)
    edited = model.codebook.clone()
    edited[3] = 0
    model.export(
        SafeCodebook.from_tables(model.codebook, edited, ArtifactMeta("test", "stripes")), tmp_path
    )
    assert torch.equal(read_spec(ModelConfig(str(tmp_path))).codebook, edited)
    assert np.array_equal(
        load_model(ModelConfig(str(tmp_path))).decode(tokens), model.decode(tokens, edited)
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere:FAMILY", "cannot be loaded"),
        ("json:loads", "must name a"),
        ("isic_ray.models.registry:JANUS", "twice"),
    ],
)
def test_a_wrong_entry_point_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    install(tmp_path, value)
    monkeypatch.syspath_prepend(str(tmp_path))
    if message == "twice":
        monkeypatch.setattr(
            "isic_ray.models.registry.JANUS", known_families_without_it()["janus"], raising=False
        )
        message = "a second time"
    with pytest.raises(UserError, match=message) as caught:
        known_families()
    assert value in str(caught.value)


def known_families_without_it() -> dict[str, object]:
    from isic_ray.models.catalogue import FAMILIES

    return {family.name: family for family in FAMILIES}
