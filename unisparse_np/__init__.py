"""UniSparse: training-free sparse attention for LLM prefill (arXiv 2512.14082), readable in NumPy, fast on a GPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .attention import unisparse_attention
from .comparison import audit
from .config import UniSparseConfig
from .errors import BackendUnavailable, CheckpointError, InvalidInput, UniSparseError
from .problem import KeySummary, Problem
from .trace import Trace
from .version import __version__

if TYPE_CHECKING:
    from .model.generate import generate, stream_generate
    from .model.loading import load

__all__ = [
    "BackendUnavailable", "CheckpointError", "InvalidInput", "KeySummary", "Problem", "Trace", "UniSparseConfig", "UniSparseError",
    "__version__", "audit", "generate", "load", "stream_generate", "unisparse_attention",
]  # fmt: skip

# The model side brings tokenizers and templates with it; whoever only wants attention does not wait for them.
_LOADED_ON_USE = {"load": "model.loading", "generate": "model.generate", "stream_generate": "model.generate"}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LOADED_ON_USE[name]}", __name__), name)
