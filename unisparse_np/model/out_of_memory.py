"""What happens when memory runs out in the middle of a call."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import BackendUnavailable, InvalidInput


@contextmanager
def giving_memory_back(layers: Any, tokens: int) -> Iterator[None]:
    """Running out of memory inside ends with one sentence, and with what the call held given back to the device.

    layers: the backend's; tokens: how many are read at once inside.
    """
    try:
        yield
    except (MemoryError, BackendUnavailable) as error:
        cause = error if isinstance(error, MemoryError) else error.__cause__  # a backend may have put it into its own words
        if not isinstance(cause, MemoryError):
            raise
        for one in (error, cause):
            traceback.clear_frames(one.__traceback__)  # their variables hold the arrays
        if layers.memory is not None:
            layers.memory.release()
        raise InvalidInput(
            f"memory ran out while {tokens} tokens were read at once ({' '.join(str(cause).split())}): give a smaller --chunk-size "
            "or a shorter text, or end what else uses the memory"
        ) from None
