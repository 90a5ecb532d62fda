"""What every page shares: templates that escape, text without tricks, pictures as data URIs."""

from __future__ import annotations

import base64
import io
import unicodedata
from functools import cache
from pathlib import Path

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

Picture = npt.NDArray[np.uint8]  # [H, W, 3]

_TEMPLATES = Path(__file__).parent / "templates"
_MAX_TEXT = 400
# Characters that change the direction of the text around them.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@cache
def template(name: str) -> jinja2.Template:
    """Return a template of ``report/templates``, which escapes every text that is put into it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def style_sheet(name: str) -> Markup:
    """Return a CSS file of ``report/templates``, to stand in a page as it is."""
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))


def clean(text: object) -> str:
    """Return text for a page, of at most 400 characters.

    Control characters, surrogates and overrides of the direction are replaced: with them a text
    could look like another one.
    """
    value = str(text)[: _MAX_TEXT + 1]
    shown = "".join(
        "�" if c in _BIDI or unicodedata.category(c) in ("Cc", "Cs") else c for c in value
    )
    return shown if len(shown) <= _MAX_TEXT else shown[:_MAX_TEXT] + "…"


def picture_uri(picture: Picture) -> str:
    """Return a picture as a data URI. Raises ValueError unless it is uint8 ``[H, W, 3]``."""
    check_picture(picture)
    return image_uri(Image.fromarray(picture))


def check_picture(picture: Picture) -> None:
    """Raise ValueError unless a picture is uint8 ``[H, W, 3]``."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(
            f"a picture of a page must be uint8 [H, W, 3], got {picture.dtype} {picture.shape}"
        )


def image_uri(image: Image.Image) -> str:
    """Return an image as a data URI that holds it as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
