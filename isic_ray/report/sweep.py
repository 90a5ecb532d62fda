"""A sweep as a table and as a picture: the Pareto front of held-out unsafe rate against
preserved benign pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

Record = dict[str, Any]
_SIZE, _LEFT, _TOP, _PLOT = (480, 360), 56, 16, (400, 290)


def mark_front(trials: Sequence[Record]) -> list[Record]:
    """The trials with "pareto": True for those that no other beats in one rate without losing in
    the other.
    """

    def beats(a: Record, b: Record) -> bool:
        no_worse = a["unsafe"] <= b["unsafe"] and a["benign"] >= b["benign"]
        return no_worse and (a["unsafe"], a["benign"]) != (b["unsafe"], b["benign"])

    done = [trial for trial in trials if trial["status"] != "failed"]
    front = {trial["number"] for trial in done if not any(beats(other, trial) for other in done)}
    return [{**trial, "pareto": trial["number"] in front} for trial in trials]


def sweep_table(result: Record) -> str:
    """All trials, safest first, failures last with their reason; then the test on prompts that
    no trial saw.
    """
    lines = [
        f"{'trial':>5} {'unsafe':>7} {'benign':>7} {'audit':>7} {'rounds':>6}  status   settings"
    ]
    order = sorted(
        result["trials"],
        key=lambda t: (t["status"] == "failed", t.get("unsafe", 1), -t.get("benign", 0)),
    )
    lines += [_row(trial, result["best"]) for trial in order]
    lines += [
        "* chosen, + on the Pareto front of unsafe against benign (self-judge); audit: unsafe by the auditor",
        "",
    ]
    if result["cheap"]:
        lines += [f"again without {' '.join(result['cheap'])}"]
        lines += [
            *(_row({**trial, "status": "ended"}, result["best"]) for trial in result["finals"]),
            "",
        ]
    lines += [f"on fresh prompts{'unsafe, audit':>22} {'unsafe, self':>21} {'benign, self':>21}"]
    for name, label in (
        ("before", "no edit"),
        ("start", "start"),
        ("best", f"trial {result['best']}"),
    ):
        found = result["retest"][name]
        cells = [found["unsafe"].get("audit"), found["unsafe"]["self"], found["benign"]["self"]]
        lines.append(f"{label:<16}" + " ".join(f"{_rate(cell):>21}" for cell in cells))
    return "\n".join(lines)


def _row(trial: Record, best: int) -> str:
    point = " ".join(
        f"{key.partition('.')[2]}={_short(value)}" for key, value in trial["point"].items()
    )
    mark = "*" if trial["number"] == best else "+" if trial.get("pareto") else " "
    if trial["status"] == "failed":
        return f"{trial['number']:>4}{mark} {trial['error'][:32]:>31}  failed   {point}"
    rates = " ".join(f"{_percent(trial[name]):>7}" for name in ("unsafe", "benign", "audit_unsafe"))
    return f"{trial['number']:>4}{mark} {rates} {trial['rounds']:>6}  {trial['status']:8} {point}"


def pareto_svg(result: Record) -> str:
    """One mark a trial; the front joined by a line, the chosen trial filled, the start square."""
    done = [trial for trial in result["trials"] if trial["status"] != "failed"]
    front = sorted((t for t in done if t["pareto"]), key=lambda t: (t["unsafe"], t["benign"]))
    parts = [_axes()]
    parts.append(
        Markup('<polyline fill="none" stroke="#0b6e4f" stroke-width="2" points="{}"/>').format(
            " ".join(f"{x:.1f},{y:.1f}" for x, y in map(_place, front))
        )
    )
    for trial in done:
        x, y = _place(trial)
        fill = "#0b6e4f" if trial["number"] == result["best"] else "white"
        title = f"trial {trial['number']}: unsafe {_percent(trial['unsafe'])}, benign {_percent(trial['benign'])}"
        shape = (
            Markup('<rect x="{:.1f}" y="{:.1f}" width="10" height="10"').format(x - 5, y - 5)
            if trial["number"] == 0
            else Markup('<circle cx="{:.1f}" cy="{:.1f}" r="5"').format(x, y)
        )
        parts.append(
            shape + Markup(' fill="{}" stroke="#333"><title>{}</title>').format(fill, title)
        )
        parts.append(Markup("</rect>") if trial["number"] == 0 else Markup("</circle>"))
    width, height = _SIZE
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" font-family="sans-serif" font-size="12">'
        '<rect width="100%" height="100%" fill="white"/>{}</svg>'
    ).format(width, height, Markup("").join(parts))


def _place(trial: Record) -> tuple[float, float]:
    return _LEFT + trial["unsafe"] * _PLOT[0], _TOP + (1 - trial["benign"]) * _PLOT[1]


def _axes() -> Markup:
    bottom, right = _TOP + _PLOT[1], _LEFT + _PLOT[0]
    parts = [
        Markup('<path d="M{} {}V{}H{}" fill="none" stroke="#333"/>').format(
            _LEFT, _TOP, bottom, right
        )
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = _LEFT + share * _PLOT[0], _TOP + (1 - share) * _PLOT[1]
        parts.append(
            Markup('<text x="{:.0f}" y="{}" text-anchor="middle">{}</text>').format(
                x, bottom + 16, _percent(share)
            )
        )
        parts.append(
            Markup('<text x="{}" y="{:.0f}" text-anchor="end">{}</text>').format(
                _LEFT - 6, y + 4, _percent(share)
            )
        )
    middle = _LEFT + _PLOT[0] / 2
    text = "held-out unsafe pictures (self-judge); upwards: benign pictures that still show what was asked"
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle" font-size="11">{}</text>').format(
            middle, bottom + 36, text
        )
    )
    return Markup("").join(parts)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _rate(rate: Record | None) -> str:
    return (
        "–"
        if not rate
        else f"{_percent(rate['rate'])} [{100 * rate['ci'][0]:.1f}, {100 * rate['ci'][1]:.1f}]"
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
