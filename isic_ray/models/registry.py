"""Go from a `ModelConfig` to a loaded model: choose the adapter, refuse what cannot work, say why.

An adapter's module is imported only when it is chosen: adapters are heavy.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from isic_ray.config.run import ModelConfig
from isic_ray.errors import UserError
from isic_ray.models.base import Judge, ModelSpec, UnifiedModel
from isic_ray.models.catalogue import REFUSED, Family, known_families
from isic_ray.models.checkpoints import digest_files, read_model_type, weight_files
from isic_ray.models.fetching import resolve_checkpoint


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
