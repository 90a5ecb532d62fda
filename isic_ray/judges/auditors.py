"""Load judges other than the model itself. They observe, and never steer the loop.

An auditor is named in ``judge.auditors`` as KIND or KIND:ARGUMENT; `KINDS` says which there are.
Scores are stored raw and by question, so thresholds and class sets can be changed after the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from isic_ray.errors import UserError


class Auditor(Protocol):
    """A detector of harm.

    ``questions[i]`` is what ``score(...)[:, i]`` answers. It is about harm unless its name begins
    with `OBJECT` or `NOTE` of `isic_ray.runs.schema`.
    """

    name: str

    @property
    def questions(self) -> Sequence[str]: ...

    def score(self, images: np.ndarray) -> np.ndarray:
        """Return P(yes) float32 ``[B,Q]`` of pictures uint8 ``[B,H,W,3]``."""
        ...


def _pictogram(argument: str) -> Auditor:
    from isic_ray.pictogram.auditor import PictogramAuditor

    return PictogramAuditor()


def _nudenet(argument: str) -> Auditor:
    from isic_ray.judges.nudenet import NudeNetAuditor

    return NudeNetAuditor(argument or "intimate")


def _q16(argument: str) -> Auditor:
    from isic_ray.judges.clip import Q16Auditor

    return Q16Auditor(_checkpoint("q16", argument))


def _shieldgemma2(argument: str) -> Auditor:
    from isic_ray.judges.guards import ShieldGemma2Auditor

    return ShieldGemma2Auditor(_checkpoint("shieldgemma2", argument))


def _llavaguard(argument: str) -> Auditor:
    from isic_ray.judges.guards import LlavaGuardAuditor

    return LlavaGuardAuditor(_checkpoint("llavaguard", argument))


KINDS: dict[str, tuple[str, Callable[[str], Auditor]]] = {  # kind -> what it is, how to load it
    "pictogram": ("the embedded world's classifier", _pictogram),
    "nudenet": ("NudeNet; nudenet:esd counts the eight body parts of the ESD paper", _nudenet),
    "q16": ("q16:DIR, a CLIP checkpoint with Q16's prompts as DIR/q16_prompts.safetensors", _q16),
    "shieldgemma2": ("shieldgemma2:DIR, a ShieldGemma 2 checkpoint", _shieldgemma2),
    "llavaguard": ("llavaguard:DIR, a LlavaGuard checkpoint for transformers", _llavaguard),
}


def load_auditors(names: Sequence[str]) -> list[Auditor]:
    """Load the auditors that the configuration names; their verdicts carry these names.

    Raises UserError for a kind that is not known, and for what an auditor lacks.
    """
    found = []
    for name in names:
        kind, _, argument = name.partition(":")
        if kind not in KINDS:
            raise UserError(
                f"judge.auditors names {name!r}; the auditors known here are {', '.join(KINDS)}"
            )
        _, load = KINDS[kind]
        auditor = load(argument)
        auditor.name = name
        found.append(auditor)
    return found


def _checkpoint(kind: str, argument: str) -> str:
    if not argument:
        raise UserError(
            f"the auditor {kind} needs its checkpoint's directory or hub name: write {kind}:DIR"
        )
    return argument
