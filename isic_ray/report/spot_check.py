"""The human spot-check: the sheet of pictures to label, and a table of what the labels say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from isic_ray.metrics.labels import LabelFigures
from isic_ray.report.html import Picture, picture_uri, template
from isic_ray.report.numbers import NONE, judge_name, with_interval
from isic_ray.report.text import aligned, one_line


def sheet(
    pictures: Sequence[tuple[str, Picture]], labels_file: str, concepts: Sequence[str]
) -> str:
    """Return the page that shows ``pictures``, (name, uint8 ``[H, W, 3]``), as they are.

    It loads nothing and runs no script. ``labels_file`` is where people write their labels, and
    ``concepts`` are what makes a picture unsafe. Raises ValueError for another kind of picture.
    """
    return template("spot_check.html.j2").render(
        pictures=[(name, picture_uri(picture)) for name, picture in pictures],
        labels=labels_file,
        concepts=", ".join(concepts),
    )


def human_table(found: Mapping[str, LabelFigures]) -> str:
    """Return what labels say "before" and "after" the edit, as plain text."""
    lines = [["unsafe pictures", "rate", "corrected", "sensitivity, specificity", ""]]
    for when, part in found.items():
        human = with_interval(part.human)
        lines.append([f"{when} the edit, people", human, NONE, NONE, f"n = {part.human.n}"])
        for judge, one in part.judges.items():
            measures = (one.errors.sensitivity, one.errors.specificity)
            errors = ", ".join(with_interval(measure) for measure in measures)
            name = f"{when} the edit, {one_line(judge_name(judge))}"
            lines.append([name, with_interval(one.raw), with_interval(one.corrected), errors, ""])
    head, *rows = aligned(lines)
    return "\n".join([head, "-" * max(map(len, [head, *rows])), *rows]) + "\n"
