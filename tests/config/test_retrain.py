"""Are the settings of a retraining and its folder of pictures read strictly?"""

from __future__ import annotations

from pathlib import Path

import pytest

from isic_ray.config.retrain import retrain_config
from isic_ray.errors import UserError
from isic_ray.execution.pictures import find_pictures


def test_micro_batches_add_up_to_a_batch() -> None:
    config = retrain_config(
        "run", "pictures", ["batch_size=64", "micro_batch=8", "workers=4", "min_workers=1"]
    )
    assert [config.accumulate(workers) for workers in (1, 2, 3, 4)] == [8, 4, 3, 2]


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("stesp=3", "did you mean steps"),
        ("steps", "write it as KEY=VALUE"),
        ("steps=many", "steps"),
        ("zero_stage=4", "0, 1, 2 or 3"),
        ("workers=3", "multiple of micro_batch"),
        ("learning_rate=0", "above 0"),
        ("min_workers=2", "from 0 to workers"),
    ],
)
def test_what_is_wrong_is_named(setting: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        retrain_config("run", "pictures", [setting])
    assert complaint in str(caught.value)


def test_files_are_split_by_name(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number}.png").write_bytes(b"")
    found = find_pictures(str(tmp_path))
    assert (found.kind, len(found.train), len(found.evaluate)) == ("files", 98, 2)
    assert not set(found.train) & set(found.evaluate)
    assert find_pictures(str(tmp_path)) == found


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ([], "holds no pictures"),
        (["notes.txt"], "holds no pictures"),
        (["a.png"], "at least two"),
        (["a.parquet", "b.tar"], "parquet and tar"),
    ],
)
def test_a_folder_without_use_is_named(tmp_path: Path, names: list[str], complaint: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        find_pictures(str(tmp_path))
    assert complaint in str(caught.value)
