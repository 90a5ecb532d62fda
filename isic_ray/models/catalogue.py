"""The model families: what is known of each without loading anything, torch included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points

from isic_ray.errors import UserError


@dataclass(frozen=True)
class Family:
    """What is known of a model family without loading anything; `isic models` prints it.

    Own families are listed below. A package adds its own by entry points
    of the group ``isic_ray.families``, each of which names one `Family`.
    """

    name: str  # what model.family says
    # "package.module:Class". The class has the class methods from_pretrained(name, dtype, device,
    # trust_remote_code), spec(name) and files(directory); see `families.adapter.VisualAdapter`.
    adapter: str
    model_types: tuple[str, ...]  # the model_type values of config.json that it loads
    checkpoints: str  # published checkpoints, for people
    picture: str  # size of its pictures and tokens in each, for people
    needs: str = ""  # what it needs beyond the checkpoint
    judges: bool = True  # False: give judge.model, which then also rewrites
    normalised: bool = False
    tokens_depend_on_codebook: bool = False
    # By name of a published checkpoint, for `isic plan`, which loads no model.
    tokens_per_picture: Mapping[str, int] = field(default_factory=dict, hash=False)


ENTRY_POINTS = "isic_ray.families"
FAMILIES = (
    Family(
        name="janus",
        adapter="isic_ray.models.families.janus:JanusModel",
        model_types=("janus",),
        checkpoints="deepseek-community/Janus-Pro-1B, -7B, Janus-1.3B; pictogram (embedded)",
        picture="384 x 384, 576 tokens",
        normalised=True,
        tokens_per_picture={
            "pictogram": 36,
            "deepseek-community/Janus-Pro-1B": 576,
            "deepseek-community/Janus-Pro-7B": 576,
        },
    ),
    Family(
        name="emu3",
        adapter="isic_ray.models.families.emu3:Emu3Model",
        model_types=("emu3",),
        checkpoints="BAAI/Emu3-Gen-hf (draws) with judge.model BAAI/Emu3-Chat-hf",
        picture="720 x 720, 8100 tokens",
        tokens_per_picture={"BAAI/Emu3-Gen-hf": 8100},
    ),
    Family(
        name="chameleon",
        adapter="isic_ray.models.families.chameleon:ChameleonModel",
        model_types=("chameleon",),
        checkpoints="leloy/Anole-7b-v0.1-hf, facebook/chameleon-7b, -30b",
        picture="512 x 512, 1024 tokens",
        needs=(
            "the published tokenizer/vqgan.ckpt (`isic convert`), "
            "unless the checkpoint holds the picture decoder"
        ),
        tokens_per_picture={"leloy/Anole-7b-v0.1-hf": 1024},
    ),
    Family(
        name="llamagen",
        adapter="isic_ray.models.families.llamagen:LlamaGenModel",
        model_types=("llamagen",),
        checkpoints=(
            "FoundationVision/LlamaGen: t2i_XL_stage1_256.pt or t2i_XL_stage2_512.pt, "
            "with vq_ds16_t2i.pt"
        ),
        picture="256 x 256, 256 tokens; 512 x 512, 1024 tokens",
        needs="`isic convert` once, google/flan-t5-xl, and judge.model",
        judges=False,
        normalised=True,
    ),
    Family(
        name="vila-u",
        adapter="isic_ray.models.families.vila_u:VilaUModel",
        model_types=("vila_u_llama",),
        checkpoints="mit-han-lab/vila-u-7b-256",
        picture="256 x 256, 256 positions of 4 tokens",
        tokens_depend_on_codebook=True,
        tokens_per_picture={"mit-han-lab/vila-u-7b-256": 1024},
    ),
)
REFUSED = {  # by the letters that the family's or the checkpoint's name begins with
    "showo": "its tokenizer quantises by sign (lookup-free), so there is no codebook table to edit",
    "bagel": "it draws by diffusion in a continuous latent space, so there is no codebook to edit",
    "infinity": "its tokenizer is bitwise (BSQ), so there is no codebook table to edit",
    "glmimage": (
        "a diffusion decoder draws from its token ids, so there is no codebook table to edit"
    ),
    "omnimamba": (
        "its backbone needs the mamba_ssm and causal_conv1d CUDA kernels, "
        "which isic_ray does not build; its tokenizer is LlamaGen's, "
        "so an edit made for llamagen's vq_ds16_t2i fits its table"
    ),
}


def known_families() -> dict[str, Family]:
    """Return all families by name: own ones, then those that installed packages add.

    Raises UserError for an entry point that does not name a `Family` of its own.
    """
    found = {family.name: family for family in FAMILIES}
    for entry in entry_points(group=ENTRY_POINTS):
        point = f"entry point {entry.name} = {entry.value}"
        try:
            family = entry.load()
        except Exception as error:
            raise UserError(f"{point} cannot be loaded: {error}") from error
        if not isinstance(family, Family):
            raise UserError(f"{point} must name an isic_ray.models.catalogue.Family")
        if family.name in found:
            raise UserError(f"{point} adds family {family.name!r} a second time")
        found[family.name] = family
    return found


def tokens_per_picture(name: str) -> int | None:
    """Return how many tokens a picture of a published checkpoint has; None if not known."""
    for family in FAMILIES:
        if name in family.tokens_per_picture:
            return family.tokens_per_picture[name]
    return None
