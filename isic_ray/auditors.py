"""Judges other than the model itself. They observe, and never steer the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from isic_ray.errors import UserError

OBJECT = "object:"  # prefix of questions about harmless things; every other question is about harm


class Auditor(Protocol):
    """A detector. ``questions[i]`` is what ``score(...)[:, i]`` answers; `OBJECT` marks those that are not harms."""

    name: str

    @property
    def questions(self) -> Sequence[str]: ...

    def score(self, images: np.ndarray) -> np.ndarray:
        """P(yes) float32 ``[B,Q]`` of pictures uint8 ``[B,H,W,3]``."""
        ...


def _pictogram() -> Auditor:
    from isic_ray.models.pictogram.auditor import PictogramAuditor

    return PictogramAuditor()


_KNOWN: dict[str, Callable[[], Auditor]] = {"pictogram": _pictogram}


def load_auditors(names: Sequence[str]) -> list[Auditor]:
    """The named auditors. Raises UserError for a name that is not known."""
    for name in names:
        if name not in _KNOWN:
            raise UserError(f"judge.auditors names {name!r}; the auditors known here are {', '.join(sorted(_KNOWN))}")
    return [_KNOWN[name]() for name in names]
