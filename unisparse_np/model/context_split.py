"""Context parallelism: which queries of a chunk each of several ranks computes, and how their rows come together again.

Under causality a query costs as much as there are tokens before it. The chunk's query blocks are therefore cut into 2 N runs, and
rank r takes runs r and 2 N - 1 - r: an early one with a late one, the same cost for all. A run starts on a query block's boundary and
its attention call sees all keys of the chunk, so its block decisions are those of one process bit by bit (ALGORITHM.md, "Consequences").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..parallel import Communicator
from ..problem import ceil_div

TokenIds = Sequence[int] | np.ndarray  # [T]


@dataclass(frozen=True)
class ContextSplit:
    """A chunk of `tokens` tokens whose rows are shared out.

    Attributes:
        edges: run n is tokens edges[n] .. edges[n+1]-1 of the chunk.
        runs: [start, stop) of the runs that this rank computes, in order; their rows follow each other in its arrays.
    """

    tokens: int
    edges: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    ranks: Communicator

    @classmethod
    def of(cls, tokens: int, block_size: int, ranks: Communicator) -> ContextSplit:
        """Share out a chunk. One of fewer blocks than there are runs (a decode step) is computed whole by each rank."""
        count = 2 * ranks.size
        blocks = ceil_div(tokens, block_size)
        if ranks.size == 1 or blocks < count:
            return cls(tokens, (0, tokens), ((0, tokens),), ranks)
        edges = tuple(min(tokens, blocks * n // count * block_size) for n in range(count + 1))
        return cls(tokens, edges, tuple((edges[n], edges[n + 1]) for n in _runs_of(ranks.rank, count)), ranks)

    @property
    def shared(self) -> bool:
        """Whether each rank has rows of its own; otherwise every rank computes all of them."""
        return len(self.runs) > 1

    def own_tokens(self, token_ids: TokenIds) -> TokenIds:
        """This rank's of the chunk's token ids."""
        return [token_id for start, stop in self.runs for token_id in token_ids[start:stop]] if self.shared else token_ids

    def token_of(self, row: int) -> int:
        """Which of the chunk's tokens a row of this rank's arrays is."""
        return next(start + row - rows.start for rows, (start, _) in self.rows() if row < rows.stop)

    def rows(self) -> list[tuple[slice, tuple[int, int]]]:
        """For each own run: where its rows are in this rank's arrays, and which of the chunk's tokens they are."""
        places, start = [], 0
        for run in self.runs:
            stop = start + run[1] - run[0]
            places.append((slice(start, stop), run))
            start = stop
        return places

    def joined(self, xp: Any, parts: list[Any]) -> Any:
        """One [t, n] a run -> this rank's rows [own rows, n]."""
        if len(parts) == 1:
            return parts[0]
        out = xp.empty((sum(map(len, parts)), parts[0].shape[1]), dtype=parts[0].dtype)
        for (rows, _), part in zip(self.rows(), parts, strict=True):
            out[rows] = part
        return out

    def gather(self, xp: Any, *pairs: tuple[Any, Any]) -> None:
        """Bring all ranks' rows together, in one exchange: for each pair, mine [H, own rows, d] -> out [H, tokens, d], written."""
        heads, _, width = pairs[0][0].shape
        longest = max(stop - start for start, stop in pairwise(self.edges))
        padded = xp.zeros((len(pairs), 2, heads, longest, width), dtype=pairs[0][0].dtype)  # runs are of different lengths
        for n, (mine, _) in enumerate(pairs):
            for half, (rows, (start, stop)) in enumerate(self.rows()):
                padded[n, half, :, : stop - start] = mine[:, rows]
        gathered = self.ranks.all_gather(padded)  # [ranks, pairs, 2, H, longest, d]
        for rank in range(self.ranks.size):
            for half, run in enumerate(_runs_of(rank, 2 * self.ranks.size)):
                start, stop = self.edges[run], self.edges[run + 1]
                for n, (_, out) in enumerate(pairs):
                    out[:, start:stop] = gathered[rank, n, half, :, : stop - start]

    def whole(self, xp: Any, x: Any) -> Any:
        """This rank's rows x [own rows, n] -> those of the whole chunk [tokens, n]."""
        if not self.shared:
            return x
        out = xp.empty((self.tokens, x.shape[1]), dtype=x.dtype)
        self.gather(xp, (x[None], out[None]))
        return out

    def last(self, x: Any) -> Any:
        """x [own rows, n] -> a copy [1, n] of the chunk's last row, which is rank 0's."""
        return self.ranks.all_gather(x[-1:])[0] if self.shared else x[-1:].copy()


def _runs_of(rank: int, count: int) -> tuple[int, int]:
    return rank, count - 1 - rank
