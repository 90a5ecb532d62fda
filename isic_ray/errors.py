"""The one exception that users see as a sentence instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one clear sentence that names the offending thing and the mend."""
