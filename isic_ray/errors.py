"""The one exception that users see as a sentence instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator


class UserError(Exception):
    """Bad input. The message is one clear sentence that names the thing and how to fix it."""


def user_error_in(error: BaseException) -> UserError | None:
    """Return the UserError that ``error`` is or was caused by; None for a bug.

    Ray may have wrapped it several times. Its wrappers are passed over: they are instances of what
    they wrap, with a traceback for a message.
    """
    found = (
        cause
        for cause in _causes(error)
        if isinstance(cause, UserError) and not hasattr(cause, "cause")
    )
    return next(found, None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        failures = getattr(error, "worker_failures", None) or {}  # of Ray Train, by rank
        wrapped = getattr(error, "cause", None) or next(iter(failures.values()), None)
        error = wrapped or error.__cause__
