"""Is every published prompt set read in its own schema?

The rows here are harmless; only the columns are real.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from isic_ray.cli.main import main
from isic_ray.config.run import PromptsConfig
from isic_ray.errors import UserError
from isic_ray.prompts.sets import category, inspect, read_set
from isic_ray.runs.schema import BENIGN, UNSAFE

I2P = (  # as AIML-TUDA publishes it
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,"
    "sd_safety_percentage,prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,"
    "sd_image_height,sd_model\n"
    '"a knight, oil on canvas","hate, self-harm",0,50.0,0.0,40.0,0.0,0.1,https://x/1,2219830,7,'
    "512,512,SD 1.4\n"
    '"a knight, oil on canvas","hate, self-harm",0,50.0,0.0,40.0,0.0,0.1,https://x/2,2219831,7,'
    "512,512,SD 1.4\n"
    "a storm,shocking,1,80.0,0.0,70.0,0.0,0.2,https://x/3,9,7,512,512,SD 1.4\n"
)
I2P_ESD = (  # as the ESD, UCE and MACE code bases carry it
    "case_number,prompt,categories,hard,inappropriate_percentage,nudity_percentage,"
    "evaluation_guidance,evaluation_seed\n"
    "0,a quiet lake,illegal activity,0,1.0,0.0,7.5,42\n"
)
COPRO = (
    "prompt,image,category\na red square,1.jpg,Self-Harm\na tree,2.jpg,VIOLENECE\n"
    "a bench,3.jpg,Ilegal Activity\n"
)
RING = ",sensitive prompt,normal prompt\n0,zx portrait qy,a portrait\n1,lo hill rr,a hill\n"
MMA = (
    "target_prompt,adv_prompt,sanitized_adv_prompt,"
    "success_against_sanitization_defense,clean_prompt\n"
    "a plain target,xq target mm,target,True,a dog on grass\n"
)
SIX_CLEAN = (
    'case_number,evaluation_seed,prompt\n0,27858,"football, grass, house"\n'
    '1,23635,"zoo, horse, fence"\n'
)
SIX_MALICIOUS = 'case_number,evaluation_seed,prompt\n0,27858,"football, grass, golf ball"\n'
COCO = "case_number,source,prompt,evaluation_seed,coco_id\n0,coco,A man on a surfboard.,5,139\n"
COCO_IMAGE = "image_id,id,caption\n139,38,A room with chairs.\n139,67,A room with a table.\n"


def csv_file(folder: Path, text: str, name: str = "set.csv") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize(
    ("text", "role", "texts", "known"),
    [
        (I2P, UNSAFE, ["a knight, oil on canvas", "a storm"], ("I2P", 4703)),
        (I2P_ESD, UNSAFE, ["a quiet lake"], ("I2P", 4703)),
        (COPRO, UNSAFE, ["a red square", "a tree", "a bench"], ("CoProV2 prompts", 0)),
        (RING, UNSAFE, ["zx portrait qy", "lo hill rr"], ("Ring-A-Bell", 0)),
        (RING, BENIGN, ["a portrait", "a hill"], ("Ring-A-Bell", 0)),
        (MMA, UNSAFE, ["xq target mm"], ("MMA-Diffusion", 1000)),
        (MMA, BENIGN, ["a dog on grass"], ("MMA-Diffusion", 1000)),
        (SIX_CLEAN, BENIGN, ["football, grass, house", "zoo, horse, fence"], ("Six-CD", 0)),
        (SIX_MALICIOUS, UNSAFE, ["football, grass, golf ball"], ("Six-CD", 0)),
        (COCO, BENIGN, ["A man on a surfboard."], ("COCO captions", 30000)),
        (COCO_IMAGE, BENIGN, ["A room with chairs.", "A room with a table."], ("COCO captions", 0)),
    ],
)
def test_each_set_in_its_own_schema(
    tmp_path: Path, text: str, role: str, texts: list[str], known: tuple[str, int]
) -> None:
    found = read_set(csv_file(tmp_path, text), role, 0.4)
    assert [prompt.text for prompt in found.prompts] == texts
    assert found.known_as == known


def test_i2p_repeats_prompts_with_other_seeds_and_lists_categories(tmp_path: Path) -> None:
    found = inspect(csv_file(tmp_path, I2P))
    assert (found.rows, found.duplicates) == (3, 1)
    assert found.categories == {"hate": 1, "self-harm": 1, "shocking": 1}


def test_copro_labels_are_corrected(tmp_path: Path) -> None:
    assert list(inspect(csv_file(tmp_path, COPRO)).categories) == [
        "self-harm",
        "violence",
        "illegal activity",
    ]


def test_copro_as_the_hub_serves_it(tmp_path: Path) -> None:
    rows = [
        {
            "image": {"bytes": b"\x89PNG", "path": "0.jpg"},
            "jpg_0": "a",
            "jpg_1": "b",
            "label_0": 1,
            "caption": "a hat",
        }
    ]
    path = tmp_path / "train-00000-of-00008.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = inspect(str(path))
    assert [prompt.text for prompt in found.prompts] == ["a hat"]
    assert found.known_as == ("CoProV2", 31380)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("Sexual Content", "sexual"),
        ("self_harm", "self-harm"),
        ("Harrassment", "harassment"),
        ("weapon", "weapon"),
        ("Gore", "gore"),
        ("hat", "hat"),
        ("heat", "heat"),
    ],
)
def test_categories(label: str, name: str) -> None:
    assert category(label) == name


def test_a_column_can_be_named(tmp_path: Path) -> None:
    source = csv_file(tmp_path, MMA)
    assert [p.text for p in read_set(f"{source}#target_prompt", UNSAFE, 0.4).prompts] == [
        "a plain target"
    ]
    assert [p.text for p in read_set(f"{source}#Sanitized-adv-prompt", UNSAFE, 0.4).prompts] == [
        "target"
    ]
    with pytest.raises(
        UserError, match=r"has no column 'prompt'; its columns are 'target_prompt', 'adv_prompt'"
    ):
        read_set(f"{source}#prompt", UNSAFE, PromptsConfig().held_out_share)


def test_inspect_names_the_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", "inspect", csv_file(tmp_path, I2P)]) == 0
    out = capsys.readouterr().out
    assert "3 rows, 2 distinct prompts, 1 duplicates" in out
    assert "has the columns of I2P (4,703 rows when whole)" in out
    assert "sd_seed (not used)" in out
