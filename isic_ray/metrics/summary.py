"""What a run found, typed: figures of one codebook, a round, an arm, the summary.

`summary.json`, `rounds/N.json` and the arms of `evidence.json` hold these as JSON (docs/runs.md);
the ``to_record`` and ``from_record`` methods here are the only writers and readers of that form.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from isic_ray.errors import UserError
from isic_ray.metrics.statistics import Agreement, PairedTest, Rate

RESULTS_VERSION = 2  # of summary.json and evidence.json
SELF = "self"  # the self-judge's key among rates
AUDIT = "audit"  # the first auditor's key; further auditors keep their names

Record = dict[str, Any]  # a JSON object
Rates = Mapping[str, Rate]  # by judge

_FLAGGED, _PSNR = "flagged", "psnr"  # keys that stand beside the judges' in a "benign" object


@dataclass(frozen=True)
class BenignFigures:
    """What became of the pictures of benign prompts."""

    exact: Rates = field(default_factory=dict)
    """Share of pictures that show what was asked, by each judge that can tell."""
    flagged: Rates = field(default_factory=dict)
    """Share of pictures that are called unsafe."""
    psnr: float | None = None
    """PSNR in dB against the base codebook's pictures; None without pictures, or for other ones."""

    def to_record(self) -> Record:
        """Return the JSON form: rates by judge, and beside them "flagged" and "psnr"."""
        return {
            **rates_to_record(self.exact),
            _FLAGGED: rates_to_record(self.flagged),
            _PSNR: self.psnr,
        }

    @classmethod
    def from_record(cls, record: Record) -> BenignFigures:
        """Read what `to_record` returned."""
        exact = {key: value for key, value in record.items() if key not in (_FLAGGED, _PSNR)}
        return cls(_rates_in(exact), _rates_in(record[_FLAGGED]), record[_PSNR])


@dataclass(frozen=True)
class Figures:
    """The figures of one codebook on held-out prompts."""

    unsafe: Rates = field(default_factory=dict)
    """Share of unsafe prompts whose pictures are unsafe."""
    benign: BenignFigures = field(default_factory=BenignFigures)
    per_concept: Mapping[str, Rates] = field(default_factory=dict)
    """``unsafe`` by concept of the prompt."""
    per_group: Mapping[str, Rates] = field(default_factory=dict)
    """``unsafe`` by group of the prompt."""

    def to_record(self) -> Record:
        """Return the JSON form."""
        return {
            "unsafe": rates_to_record(self.unsafe),
            "benign": self.benign.to_record(),
            "per_concept": {
                name: rates_to_record(rates) for name, rates in self.per_concept.items()
            },
            "per_group": {name: rates_to_record(rates) for name, rates in self.per_group.items()},
        }

    @classmethod
    def from_record(cls, record: Record) -> Figures:
        """Read what `to_record` returned; other keys of ``record`` are left alone."""
        return cls(
            _rates_in(record["unsafe"]),
            BenignFigures.from_record(record["benign"]),
            {name: _rates_in(rates) for name, rates in record["per_concept"].items()},
            {name: _rates_in(rates) for name, rates in record["per_group"].items()},
        )


@dataclass(frozen=True)
class Round:
    """One round: what was tried, what it measured, was it kept. Round 0 is before any edit."""

    round: int
    kept: bool
    codebook: str
    """Digest of the best codebook after this round."""
    figures: Figures
    """Of the codebook that was tried; of the best one so far where none was."""
    pairs: int = 0
    """Pairs that the edit was built from; in round 0 the pairs that were found."""
    sampled: int = 0
    """Pictures that were drawn."""
    seconds: float = 0.0
    tried: str = ""
    """Digest of the codebook that was tried; "" where there was none, and in round 0."""
    note: str = ""
    """Why the round was not kept, in words."""
    strength: float | None = None
    """Strength of the edit that was tried."""
    rank: int | None = None
    """Dimensions of its harmful space; 0 for an edit that has none."""
    rows: int | None = None
    """Codebook rows in which the tried codebook differs from the base."""
    touched: int | None = None
    """Held-out pictures that had to be decoded and judged again."""
    test: PairedTest | None = None
    """Did unsafe pictures become rarer than under the best codebook before?"""
    spent: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each of its stages."""

    def to_record(self) -> Record:
        """Return the JSON form; what a round does not have is left out."""
        record: Record = {
            "round": self.round,
            "kept": self.kept,
            "codebook": self.codebook,
            "pairs": self.pairs,
            "sampled": self.sampled,
            "seconds": self.seconds,
            **self.figures.to_record(),
        }
        for name in ("tried", "note", "strength", "rank", "rows", "touched"):
            if getattr(self, name) not in ("", None):
                record[name] = getattr(self, name)
        if self.test:
            record["test"] = self.test.to_dict()
        if self.spent:
            record["spent"] = dict(self.spent)
        return record

    @classmethod
    def from_record(cls, record: Record) -> Round:
        """Read what `to_record` returned."""
        names = ("round", "kept", "codebook", "pairs", "sampled", "seconds", "spent")
        optional = ("tried", "note", "strength", "rank", "rows", "touched")
        values = {name: record[name] for name in (*names, *optional) if name in record}
        test = PairedTest(**record["test"]) if "test" in record else None
        return cls(**values, figures=Figures.from_record(record), test=test)


@dataclass(frozen=True)
class Arm:
    """A variant that was evaluated on the same tokens."""

    codebook: str
    figures: Figures

    def to_record(self) -> Record:
        """Return the JSON form."""
        return {"codebook": self.codebook, **self.figures.to_record()}

    @classmethod
    def from_record(cls, record: Record) -> Arm:
        """Read what `to_record` returned."""
        return cls(record["codebook"], Figures.from_record(record))


@dataclass(frozen=True)
class ModelName:
    """The generator of a run."""

    name: str
    family: str
    digest: str
    """sha256 hex over the weights."""


@dataclass(frozen=True)
class Quarantined:
    """Rows of a run that failed and were left out."""

    rows: int = 0
    share: float = 0.0
    """Samples among them, as a share of the planned ones."""
    errors: Mapping[str, int] = field(default_factory=dict)
    """The first error of each kind and how many rows it stands for, commonest first."""


@dataclass(frozen=True)
class Summary:
    """What `summary.json` holds: all that a run found."""

    status: str
    """"complete", or "degraded" when more rows were quarantined than the settings allow."""
    model: ModelName
    fingerprint: str
    judge_threshold: float
    rounds: tuple[Round, ...]
    best_round: int
    safe_codebook: str
    """Blob of the best codebook, as a `SafeCodebook`."""
    arms: Mapping[str, Arm] = field(default_factory=dict)
    calibration: Mapping[str, Agreement] = field(default_factory=dict)
    """The self-judge against each auditor, on the base codebook's held-out pictures."""
    quarantined: Quarantined = field(default_factory=Quarantined)
    alarm: str | None = None
    """A sentence when self-judge and auditor tell different stories."""

    @property
    def first(self) -> Round:
        """Return round 0, before any edit."""
        return self.rounds[0]

    @property
    def best(self) -> Round:
        """Return the round whose codebook is the result."""
        return next(each for each in self.rounds if each.round == self.best_round)

    def to_record(self) -> Record:
        """Return the JSON form."""
        return {
            "schema": RESULTS_VERSION,
            "status": self.status,
            "model": vars(self.model),
            "fingerprint": self.fingerprint,
            "judge_threshold": self.judge_threshold,
            "rounds": [each.to_record() for each in self.rounds],
            "best_round": self.best_round,
            "safe_codebook": self.safe_codebook,
            "arms": {name: arm.to_record() for name, arm in self.arms.items()},
            "calibration": {key: found.to_dict() for key, found in self.calibration.items()},
            "quarantined": {**vars(self.quarantined), "errors": dict(self.quarantined.errors)},
            "alarm": self.alarm,
        }

    @classmethod
    def from_record(cls, record: Record, where: str) -> Summary:
        """Read what `to_record` returned. Raises UserError naming ``where`` for another version."""
        check_version(record, where)
        calibration = record["calibration"]
        return cls(
            status=record["status"],
            model=ModelName(**record["model"]),
            fingerprint=record["fingerprint"],
            judge_threshold=record["judge_threshold"],
            rounds=tuple(Round.from_record(each) for each in record["rounds"]),
            best_round=record["best_round"],
            safe_codebook=record["safe_codebook"],
            arms={name: Arm.from_record(each) for name, each in record["arms"].items()},
            calibration={key: Agreement.from_dict(each) for key, each in calibration.items()},
            quarantined=Quarantined(**record["quarantined"]),
            alarm=record["alarm"],
        )


def check_version(
    record: Record, where: str, readable: Container[Any] = (RESULTS_VERSION,)
) -> None:
    """Raise UserError, naming ``where``, unless ``record`` is of a ``readable`` version."""
    if record.get("schema") not in readable:
        raise UserError(
            f"{where} has results of version {record.get('schema')}, but this isic_ray reads "
            f"version {RESULTS_VERSION}; give the command that wrote this file once more: it "
            "writes the file again from what the run has stored."
        )


def rates_to_record(rates: Rates) -> Record:
    """Return the JSON form of rates."""
    return {key: rate.to_dict() for key, rate in rates.items()}


def _rates_in(record: Record) -> Rates:
    return {key: Rate.from_dict(each) for key, each in record.items()}
