"""Write docs/configuration.md from the settings themselves: python docs/make_configuration.py"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

from isic_ray.config.describe import describe

PAGE = Path(__file__).with_name("configuration.md")
_HEAD = """# Configuration

Every setting of a run. A recipe or a YAML file sets some of them (`isic run --config FILE`),
and `--set section.key=value` changes one. `isic config` prints them all as YAML.

Made by `python docs/make_configuration.py`: change the settings in `isic_ray.config`, not
this page.
"""


def page() -> str:
    """Return the page in Markdown: a table of key, type, default and meaning per section."""
    lines = [_HEAD]
    for section, settings in groupby(describe(), lambda setting: setting.key.partition(".")[0]):
        lines += [f"## {section}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for setting in settings:
            default = f"`{json.dumps(setting.default, ensure_ascii=False)}`"
            cells = (f"`{setting.key}`", setting.type, default, setting.doc)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
