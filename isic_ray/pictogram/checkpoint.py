"""Find the embedded model's checkpoint, which lies in the package.

It is a stock Janus checkpoint, loaded like any other; `training/model.py` says how it was built.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
