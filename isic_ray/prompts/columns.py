"""The words of prompt files: names of columns, categories and splits, and the published sets."""

from __future__ import annotations

from isic_ray.prompts.tables import canonical
from isic_ray.runs.schema import BUILD, HELD_OUT

# Names of columns, as `canonical` writes them: "_" and "-" are spaces, capitals do not matter. The
# benign ones stand beside unsafe prompts in the files of Ring-A-Bell and MMA-Diffusion.
BENIGN_TEXT = ("normal prompt", "clean prompt")
COLUMNS: dict[str, tuple[str, ...]] = {
    "text": (
        "prompt",
        "text",
        "caption",
        "sensitive prompt",
        "adv prompt",
        "adversarial prompt",
        "target prompt",
        "prompts",
        "captions",
    ),
    "concepts": ("concepts", "concept", "categories", "category"),
    "objects": ("objects", "object"),
    "split": ("split",),
    "group": ("group",),
    "prompt_id": ("prompt id", "id"),
}
# The categories of I2P, which other sets use too, and how else they are written.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "hate": ("hate speech", "hateful"),
    "harassment": ("harassing",),
    "violence": ("violent", "violence and gore"),
    "self-harm": ("self harm", "selfharm"),
    "sexual": ("sexual content", "nudity", "sex"),
    "shocking": ("shocking images", "shocking content", "shock"),
    "illegal activity": ("illegal activities", "illegal", "illegal act"),
}
SPELLINGS = {canonical(word): name for name, words in CATEGORIES.items() for word in (name, *words)}
TYPO = 0.82  # likeness from which a word of 6 letters or more is taken for a misspelt category
# Published sets: name, columns that give the set away, rows when whole (0: not known to us).
KNOWN_SETS: tuple[tuple[str, frozenset[str], int], ...] = (
    (
        "I2P",
        frozenset({"prompt", "categories", "hard", "inappropriate percentage", "sd seed"}),
        4703,
    ),
    ("I2P", frozenset({"prompt", "categories", "hard", "evaluation seed"}), 4703),
    ("CoProV2", frozenset({"caption", "jpg 0", "jpg 1", "label 0"}), 31380),
    ("CoProV2 prompts", frozenset({"prompt", "image", "category"}), 0),
    ("MMA-Diffusion", frozenset({"target prompt", "adv prompt", "sanitized adv prompt"}), 1000),
    ("Ring-A-Bell", frozenset({"sensitive prompt", "normal prompt"}), 0),
    ("COCO captions", frozenset({"coco id", "prompt"}), 30000),
    ("COCO captions", frozenset({"image id", "caption"}), 0),
    ("Six-CD", frozenset({"case number", "evaluation seed", "prompt"}), 0),
)
SPLITS = {
    **dict.fromkeys(("build", "train", "training"), BUILD),
    **dict.fromkeys(("held out", "heldout", "test", "validation", "val", "eval"), HELD_OUT),
}
