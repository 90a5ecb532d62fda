"""A sweep's result (`sweep.json`) as a table, and as a picture of safety against preservation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isic_ray.metrics.statistics import Rate
from isic_ray.metrics.summary import AUDIT, SELF
from isic_ray.report.charts import Mark, frontier, pareto, standalone
from isic_ray.report.numbers import percent, with_interval

Record = dict[str, Any]
_FAILED = "failed"


def mark_front(trials: Sequence[Record]) -> list[Record]:
    """Return the trials with "pareto": whether they lie on the Pareto front.

    On it lie those that no other beats in one rate without losing in the other.
    """
    done = [trial for trial in trials if trial["status"] != _FAILED]
    marks = {trial["number"]: _mark(trial) for trial in done}
    front = frontier(list(marks.values()))
    return [{**trial, "pareto": marks.get(trial["number"]) in front} for trial in trials]


def pareto_svg(result: Record) -> str:
    """Return an SVG file with a mark per trial: the chosen one filled, the start a square."""
    done = [trial for trial in result["trials"] if trial["status"] != _FAILED]
    chart = pareto(
        "Trials: safety against preservation",
        [_mark(trial, trial["number"] == result["best"]) for trial in done],
        across="held-out unsafe pictures, by the self-judge",
        upwards="benign pictures that still show what was asked",
    )
    return standalone(chart)


def sweep_table(result: Record) -> str:
    """Return all trials as text, safest first, failures last; then the test on fresh prompts."""
    best, trials = result["best"], sorted(result["trials"], key=_safest_first)
    names = f"{'trial':>5} {'unsafe':>7} {'benign':>7} {'audit':>7} {'rounds':>6}"
    lines = [f"{names}  status   settings", *(_row(trial, best) for trial in trials)]
    lines += [
        "* chosen, + on the Pareto front of unsafe against benign (self-judge); "
        "audit: unsafe by the auditor",
        "",
    ]
    if result["cheap"]:
        finals = [_row({**trial, "status": "ended"}, best) for trial in result["finals"]]
        lines += [f"again without {' '.join(result['cheap'])}", *finals, ""]
    lines += [f"on fresh prompts{'unsafe, audit':>22} {'unsafe, self':>21} {'benign, self':>21}"]
    for name, label in (("before", "no edit"), ("start", "start"), ("best", f"trial {best}")):
        found = result["retest"][name]
        cells = [found["unsafe"].get(AUDIT), found["unsafe"][SELF], found["benign"][SELF]]
        rates = [with_interval(Rate.from_dict(cell) if cell else None) for cell in cells]
        lines.append(f"{label:<16}" + " ".join(f"{rate:>21}" for rate in rates))
    return "\n".join(lines)


def _mark(trial: Record, chosen: bool = False) -> Mark:
    number, unsafe, benign = trial["number"], trial["unsafe"], trial["benign"]
    return Mark(
        name=str(number) if chosen else "",  # many trials lie too near to each other for names
        title=f"trial {number}: unsafe {percent(unsafe)}, benign {percent(benign)}",
        unsafe=unsafe,
        exact=benign,
        strong=chosen,
        square=number == 0,
    )


def _safest_first(trial: Record) -> tuple[bool, float, float]:
    return trial["status"] == _FAILED, trial.get("unsafe", 1), -trial.get("benign", 0)


def _row(trial: Record, best: int) -> str:
    point = " ".join(
        f"{key.partition('.')[2]}={_short(value)}" for key, value in trial["point"].items()
    )
    mark = "*" if trial["number"] == best else "+" if trial.get("pareto") else " "
    if trial["status"] == _FAILED:
        return f"{trial['number']:>4}{mark} {trial['error'][:32]:>31}  failed   {point}"
    rates = " ".join(f"{percent(trial[name]):>7}" for name in ("unsafe", "benign", "audit_unsafe"))
    return f"{trial['number']:>4}{mark} {rates} {trial['rounds']:>6}  {trial['status']:8} {point}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
