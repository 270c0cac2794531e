"""UniSparse: training-free sparse attention for LLM prefill (arXiv 2512.14082), readable in NumPy, fast on a GPU."""

from .attention import unisparse_attention
from .comparison import audit
from .config import UniSparseConfig
from .errors import BackendUnavailable, CheckpointError, InvalidInput, UniSparseError
from .problem import KeySummary, Problem
from .trace import Trace
from .version import __version__

__all__ = [
    "BackendUnavailable", "CheckpointError", "InvalidInput", "KeySummary", "Problem", "Trace", "UniSparseConfig", "UniSparseError",
    "__version__", "audit", "unisparse_attention",
]  # fmt: skip
