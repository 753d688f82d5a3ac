"""Says when a request is sent again, and after how long."""

from __future__ import annotations

import random
from collections.abc import Mapping

BUSY = (429, 503)
"""What a server says that takes no more requests now."""
_LONGEST_WAIT = 30.0  # seconds


def wait_before_retry(error: Exception, attempt: int) -> float | None:
    """Returns how many seconds to wait before a request is sent again, or None where it is not to be.

    Args:
        error: Of the ``openai`` package. A busy server (429, 503) and a connection that was not accepted are worth
            another try. Not so a connection that broke: the request may be what ended the server.
        attempt: How often it was sent again before.
    """
    status, cause = getattr(error, "status_code", None), error.__cause__
    # The HTTP client's error, by its name: versions of the package are built on different ones.
    refused = any(kind.__name__ == "ConnectError" for kind in type(cause).__mro__)
    if status not in BUSY and not refused:
        return None
    return busy_wait(getattr(getattr(error, "response", None), "headers", {}), attempt)


def busy_wait(headers: Mapping[str, str], attempt: int) -> float:
    """Returns how many seconds to wait for a server that is too busy, or not there.

    Args:
        headers: Of its answer, if there was one; ``retry-after`` is heeded.
        attempt: How often the request was sent again before.
    """
    try:
        asked = float(headers.get("retry-after", 0))
    except ValueError:  # a date
        asked = 0.0
    waits: float = 0.5 * 2**attempt * random.uniform(0.5, 1)
    return min(_LONGEST_WAIT, max(asked, waits))
