"""Which failures of a store are worth another try, and how long to wait before it."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

# With the pauses below 32 to 54 s before giving up: longer than a server takes to restart.
TRIES = 10
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
_TRANSIENT_CODES = frozenset(
    {"SlowDown", "RequestTimeout", "OperationAborted", "XAmzContentSHA256Mismatch"}
)
_TRANSIENT_ERRNO = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENETUNREACH}
)
# Errors of botocore and aiohttp, by name: importing them costs half a second.
_TRANSIENT_TYPES = frozenset(
    {
        "ConnectionError",
        "TimeoutError",
        "HTTPClientError",
        "ClientConnectionError",
        "ClientPayloadError",
        "IncompleteReadError",
        "ResponseParserError",
    }
)


def pauses() -> Iterator[float | None]:
    """Yield the seconds to wait after each failed try, and None after the last.

    Each is up to 25 % shorter or longer by chance, so that workers that failed together do not
    return together.
    """
    for step in range(TRIES - 1):
        yield min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**step) * random.uniform(0.75, 1.25)
    yield None


def server_answer(error: BaseException) -> tuple[str, int]:
    """Return the error code and HTTP status of an S3 server's answer.

    They are "" and 0 when no server answered.
    """
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return "", 0
    code = response.get("Error", {}).get("Code", "")
    return code, response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def is_taken(error: Exception) -> bool:
    """Say whether an object was there already."""
    return isinstance(error, FileExistsError) or server_answer(error)[1] == 412


def is_transient(error: Exception) -> bool:
    """Say whether the same request may succeed later."""
    code, status = server_answer(error)
    if status or code:
        server_failed = status >= 500 and status != 501
        return status in (408, 409, 429) or server_failed or code in _TRANSIENT_CODES
    if any(base.__name__ in _TRANSIENT_TYPES for base in type(error).__mro__):
        return True  # before the next line: some of botocore's are OSErrors without a number
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO
