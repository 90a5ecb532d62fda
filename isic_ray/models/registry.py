"""Go from a `ModelConfig` to a loaded model: choose the adapter, refuse what cannot work, say why.

An adapter's module is imported only when it is chosen: adapters are heavy.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from isic_ray.config.run import ModelConfig
from isic_ray.errors import UserError
from isic_ray.models.base import Family, Judge, ModelSpec, UnifiedModel
from isic_ray.models.checkpoints import digest_files, read_model_type, weight_files
from isic_ray.models.fetching import resolve_checkpoint

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


def load_model(config: ModelConfig) -> UnifiedModel:
    """Load the model that ``config`` names. Raises UserError with the reason when it cannot be."""
    adapter = adapter_of(find_family(config))
    model: UnifiedModel = adapter.from_pretrained(
        config.name, config.dtype, config.device, config.trust_remote_code
    )
    return model


def load_judge(config: ModelConfig) -> Judge:
    """Load a judge: a model of a known family, or any vision-language model of transformers.

    Raises UserError when it is neither.
    """
    if _family_in(resolve_checkpoint(config.name)):
        return load_model(config)
    from isic_ray.models.families.vision_language import VisionLanguageJudge

    return VisionLanguageJudge.from_pretrained(
        config.name, config.dtype, config.device, config.trust_remote_code
    )


def load_generator_and_judge(config: ModelConfig, judge: str = "") -> tuple[UnifiedModel, Judge]:
    """Load the generator that ``config`` names, and who judges and rewrites for it.

    ``judge`` is the checkpoint of judge.model; "" makes the generator its own judge. Raises
    UserError when one of them cannot be loaded.
    """
    generator = load_model(config)
    if not judge:
        return generator, generator
    return generator, load_judge(replace(config, name=judge, family="auto"))


def read_spec(config: ModelConfig) -> ModelSpec:
    """Return digest and codebook of the model that ``config`` names, without loading it.

    Raises UserError when its files are not sound.
    """
    spec: ModelSpec = adapter_of(find_family(config)).spec(config.name)
    return spec


def digest_judge(name: str) -> str:
    """Return sha256 hex over the weights of judge.model ``name``, "" for none.

    Raises UserError when there is no such checkpoint.
    """
    if not name:
        return ""
    directory = resolve_checkpoint(name)
    family = _family_in(directory)
    return digest_files(adapter_of(family).files(directory) if family else weight_files(directory))


def tokens_per_picture(name: str) -> int | None:
    """Return how many tokens a picture of a published checkpoint has; None if not known."""
    for family in known_families().values():
        if name in family.tokens_per_picture:
            return family.tokens_per_picture[name]
    return None


def find_family(config: ModelConfig) -> Family:
    """Return the family that ``config.family`` names, or for "auto" that of the checkpoint.

    Raises UserError, with the reason, when it is refused or not known.
    """
    known, name = known_families(), config.family
    if name == "auto":
        _refuse(config.name.rsplit("/", 1)[-1], config.name)  # before fetching gigabytes
        name = read_model_type(resolve_checkpoint(config.name))
    _refuse(name, config.name)
    for family in known.values():
        if name in (family.name, *family.model_types):
            return family
    raise UserError(
        f"model {config.name!r} is of family {name!r}; known families: {', '.join(known)}"
    )


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
            raise UserError(f"{point} must name an isic_ray.models.base.Family")
        if family.name in found:
            raise UserError(f"{point} adds family {family.name!r} a second time")
        found[family.name] = family
    return found


def adapter_of(family: Family) -> Any:
    """Import and return the adapter class of a family."""
    module, _, name = family.adapter.partition(":")
    return getattr(importlib.import_module(module), name)


def _family_in(directory: Path) -> Family | None:
    """Return the known family of a checkpoint, by its model_type; None for another model."""
    model_type = read_model_type(directory)
    families = known_families().values()
    return next((family for family in families if model_type in family.model_types), None)


def _refuse(family: str, name: str) -> None:
    """Raise UserError with the reason if a family of that name cannot be edited."""
    letters = re.sub(r"[^a-z]", "", family.lower())
    for refused, reason in REFUSED.items():
        if letters.startswith(refused):
            raise UserError(f"model {name!r} cannot be edited: {reason}")
