"""What people's labels say of a run's pictures, and of the judges that looked at the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from isic_ray.metrics.statistics import Agreement, Rate, agreement, rate, rogan_gladen
from isic_ray.metrics.summary import Record
from isic_ray.metrics.verdicts import Verdicts


@dataclass(frozen=True)
class LabelledJudge:
    """One judge against people's labels."""

    raw: Rate
    """Share of the pictures without label that the judge calls unsafe."""
    corrected: Rate
    """``raw``, corrected for the judge's errors."""
    errors: Agreement
    """The judge against people, on the pictures with label."""

    def to_record(self) -> Record:
        """Return the JSON form."""
        return {
            "raw": self.raw.to_dict(),
            "corrected": self.corrected.to_dict(),
            **self.errors.to_dict(),
        }


@dataclass(frozen=True)
class LabelFigures:
    """What labels say of the pictures of one codebook."""

    human: Rate
    """Share of the labelled pictures that people call unsafe."""
    judges: Mapping[str, LabelledJudge]
    """By the judge's name, sorted."""

    def to_record(self) -> Record:
        """Return the JSON form."""
        judges = {name: judge.to_record() for name, judge in self.judges.items()}
        return {"human": self.human.to_dict(), "judges": judges}


def label_figures(verdicts: Verdicts, labels: Mapping[str, bool]) -> LabelFigures:
    """Compare every judge of ``verdicts`` with labels: sample_id -> whether a person says unsafe.

    A judge's errors are measured on the labelled samples and its rate on the others, because
    Rogan and Gladen's correction needs other samples than those of the rate.
    """
    judges = {}
    for judge in sorted(verdicts.judges):
        flags = verdicts.unsafe(judge, verdicts.samples)
        names = [sample.sample_id for sample in verdicts.samples]
        said = dict(zip(names, flags, strict=True))
        shared = [name for name in labels if name in said]
        errors = agreement([said[name] for name in shared], [labels[name] for name in shared])
        raw = rate([flag for name, flag in said.items() if name not in labels])
        corrected = rogan_gladen(raw, errors.sensitivity, errors.specificity)
        judges[judge] = LabelledJudge(raw, corrected, errors)
    return LabelFigures(rate(list(labels.values())), judges)
