"""Copy the committed results into the site.

Pages link to ../tests/results, which a code host follows; a site lacks what is outside docs/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add every file of tests/results to the site, in its folder results/."""
    for path in sorted((Path(config.config_file_path).parent / "tests" / "results").iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page whose links to results stay within the site."""
    return markdown.replace("](../tests/results/", "](results/")
