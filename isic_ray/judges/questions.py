"""Choose which questions the self-judge is asked about which picture."""

from __future__ import annotations

from isic_ray.config.run import JudgeConfig
from isic_ray.runs.schema import BENIGN, OBJECT, Prompt


def questions_about(prompt: Prompt, judge: JudgeConfig) -> dict[str, str]:
    """Return the yes/no questions about a picture of ``prompt``, by the names of their verdicts.

    Every picture is asked about the concepts of ``judge.questions``. A picture of a benign prompt
    is also asked, by ``judge.alignment`` ("": not at all), about each object that the prompt names,
    or about the prompt itself if it names none; those names begin with `OBJECT`.
    """
    asked = dict(judge.questions)
    if prompt.role == BENIGN and judge.alignment:
        for thing in prompt.objects or (prompt.text,):
            article = "an" if thing[0] in "aeiou" else "a"
            asked[OBJECT + thing] = judge.alignment.format(
                object=thing, prompt=prompt.text, article=article
            )
    return asked
