"""From one product to attention's inputs on the GPU (cuda/rotary.cu): norms of q and k, rotary embedding, the cache, and pooling."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cupy
import numpy as np

from ...config import UniSparseConfig
from ...problem import Problem, ceil_div
from .device import kernel, source
from .key_summary import NO_PLACES, Places
from .launch import Launcher
from .overlap import OverlappingLauncher, address
from .room import FLOAT32, new
from .shapes import uses_tensor_cores

TABLE_THREADS = 256
ROTARY_WARPS, HEADS_AT_ONCE = 4, 4  # of rotary.cu
NO_POOLING = UniSparseConfig()  # what rotary.cu cuts its work by when nothing is pooled
FLOAT16 = np.dtype(np.float16)


def rotary_table(inv_freq: Any, start: int, length: int, factor: float, dtype: np.dtype) -> Any:
    """factor * (cos, sin) of position * inv_freq for positions start .. start+length-1: [T, d/2, 2] float32 whatever dtype says.

    The angle is rounded to float32, as transformers does: models were trained with those angles.
    """
    table = new((length, len(inv_freq), 2), FLOAT32)
    write_rotary_table(cupy.asarray(inv_freq, dtype=np.float32), start, None, factor, table)
    return table


def write_rotary_table(inv_freq: Any, start: int, position: Any, factor: float, table: Any) -> None:
    """The same into table; positions count from start, plus position [1] int32 on the device where one is given."""
    length, pairs = table.shape[:2]
    launcher = _table_launcher(pairs, cupy.cuda.runtime.getDevice())
    blocks = ceil_div(length * pairs, TABLE_THREADS)
    launcher(blocks, 1, inv_freq.data.ptr, start, address(position), length, float(factor), table.data.ptr)


@lru_cache(maxsize=64)
def _table_launcher(pairs: int, device: int) -> Launcher:
    function = _rotary_kernel("rotary_table", 0, 2 * pairs, np.float32, NO_POOLING, ROTARY_WARPS, False)
    return Launcher(function, source("rotary.cu"), "rotary_table", TABLE_THREADS, 0)


def rotate_heads(
    qkv: Any, table: Any, norms: tuple[Any, Any, float] | None, k_room: Any, v_room: Any, config: Any, summary: Any
) -> tuple[Any, Any]:
    """From one product to attention's inputs: norms of q and k, rotary embedding, keys and values into the cache, and pooling.

    Args:
        qkv: [T, Hq + 2 Hkv, d], queries first.
        table: as `rotary_table` makes it for these T positions.
        norms: (q_norm [d], k_norm [d], eps) of a model that normalises each head, otherwise None.
        k_room, v_room: [Hkv, T, d] of the cache, written.
        config: the layer's attention.
        summary: the RunningKeySummary of all keys before these, or None; it takes the new ones in, in the same pass over
            memory where they begin a block.

    Returns:
        q [Hq, T, d], and its composite tokens [Hc, Tq, d] float16 as run_sparse takes them; None for dense attention, and
        where shapes do not run on tensor cores.
    """
    tokens, heads, dim = qkv.shape
    kv_heads = k_room.shape[0]
    q = new((heads - 2 * kv_heads, tokens, dim), qkv.dtype)
    rotation = rotation_of(heads - 2 * kv_heads, kv_heads, tokens, dim, qkv.dtype, config if isinstance(config, UniSparseConfig) else None)
    room = summary.room(tokens) if rotation.pools and summary is not None else None
    q_composites = new(rotation.q_composites, FLOAT16) if rotation.pools else None
    rotation.launch(qkv, table, norms, None, (q, k_room, v_room), q_composites, room or NO_PLACES, summary)
    if room is not None:
        summary.took(tokens, lambda: k_room)
    elif summary is not None:
        summary.extend(k_room)
    return q, q_composites


def strides_of(x: Any) -> tuple[int, int]:
    """From head to head and from row to row of x [H, T, d], in elements."""
    head, row, element = x.strides
    return head // element, row // element


class Rotation:
    """The launch of rotary.cu for one shape: what does not change from layer to layer, worked out once.

    Attributes:
        pools: whether composites are made.
        q_composites: their shape [Hc, Tq, d].

    Args:
        q_heads, kv_heads, tokens, dim: shape of the product.
        dtype: of everything but the table. config: None to pool nothing. overlap: see `overlap.py`.
    """

    def __init__(
        self, q_heads: int, kv_heads: int, tokens: int, dim: int, dtype: np.dtype, config: UniSparseConfig | None, overlap: bool
    ) -> None:
        problem = Problem(q_heads, kv_heads, tokens, tokens, dim, NO_POOLING if config is None else config)
        self.pools = config is not None and uses_tensor_cores(problem, dtype)
        self.q_composites = (problem.num_composite_heads, problem.num_q_composites, dim)
        self._config = problem.config if self.pools else NO_POOLING
        self._k_members = problem.kv_heads_per_composite if self.pools else 1
        q_members = self._config.head_compress if self.pools else 1
        self._several = max(q_members, self._k_members) > 1
        self._at_once = heads_at_once(tokens, dim, dtype, self._several)
        groups = ceil_div(q_heads // q_members, self._at_once) + 2 * ceil_div(kv_heads // self._k_members, self._at_once)
        self._grid = groups, ceil_div(tokens, self._config.block_size)
        self._counts = tokens, q_heads, kv_heads, q_members, self._k_members
        self._dim, self._dtype, self._overlap = dim, dtype, overlap
        self._launchers: dict[bool, Launcher] = {}  # by whether anchors are looked for

    def launch(
        self, qkv: Any, table: Any, norms: Any, position: Any, outputs: tuple[Any, Any, Any], q_composites: Any = None,
        room: Places = NO_PLACES, summary: Any = None,
    ) -> None:  # fmt: skip
        """qkv [T, Hq + 2 Hkv, d] -> outputs (q [Hq, T, d], k and v [Hkv, .., d], written from row position on).

        room: places of the keys' composites and anchors.
        """
        q, k, v = outputs
        addresses = (qkv.data.ptr, table.data.ptr, address(position), q.data.ptr, k.data.ptr, v.data.ptr, address(q_composites))
        self.launch_at(addresses, norms, (*strides_of(k), *strides_of(v)), room, 0 if summary is None else summary.length)

    def launch_at(
        self, addresses: tuple[int, ...], norms: tuple[Any, Any, float] | None, strides: tuple[int, ...], room: Places, before: int
    ) -> None:
        """The same to addresses: those of qkv, table, position, q, k, v and q_composites; strides of k and v; keys before these."""
        qkv, table, position, q, k, v, q_composites = addresses
        q_norm, k_norm, eps = (0, 0, 0.0) if norms is None else (norms[0].data.ptr, norms[1].data.ptr, float(norms[2]))
        launcher = self._launchers.get(room.anchors != 0) or self._new_launcher(room.anchors != 0)
        launcher(
            *self._grid, qkv, table, q_norm, k_norm, eps, *self._counts, position, q, k, v, *strides, q_composites, *room,
            self._config.key_anchors, before,
        )  # fmt: skip

    def _new_launcher(self, with_anchors: bool) -> Launcher:
        warps = 1 if self._counts[0] == 1 else ROTARY_WARPS
        shared = 4 * self._at_once * self._k_members * self._config.block_size if with_anchors else 0
        function = _rotary_kernel("rotate_heads", shared, self._dim, self._dtype, self._config, warps, self._several)
        kind = OverlappingLauncher if self._overlap else Launcher
        return self._launchers.setdefault(with_anchors, kind(function, source("rotary.cu"), "rotate_heads", 32 * warps, shared))


def rotation_of(
    q_heads: int, kv_heads: int, tokens: int, dim: int, dtype: np.dtype, config: UniSparseConfig | None, overlap: bool = False
) -> Rotation:
    """The Rotation of a shape on the current device, made once."""
    return _rotation(q_heads, kv_heads, tokens, dim, dtype, config, overlap, cupy.cuda.runtime.getDevice())


@lru_cache(maxsize=256)
def _rotation(
    q_heads: int, kv_heads: int, tokens: int, dim: int, dtype: np.dtype, config: UniSparseConfig | None, overlap: bool, device: int
) -> Rotation:
    return Rotation(q_heads, kv_heads, tokens, dim, dtype, config, overlap)


def heads_at_once(tokens: int, dim: int, dtype: Any, several_members: bool) -> int:
    """AT_ONCE of rotary.cu: the heads, or composite heads, of a thread block."""
    return HEADS_AT_ONCE if tokens > 1 and not several_members and dim % 16 == 0 and dtype != np.float32 else 1


def element(dtype: Any) -> dict[str, int]:
    """The defines of elements.cuh for arrays of this dtype."""
    return {"IS_FLOAT16": int(dtype == np.float16), "IS_FLOAT32": int(dtype == np.float32)}


def _rotary_kernel(name: str, shared: int, dim: int, dtype: Any, config: UniSparseConfig, warps: int, several_members: bool) -> Any:
    return kernel(
        "rotary.cu", name, shared, **element(dtype), HEAD_DIM=dim, BLOCK_SIZE=config.block_size, Q_COMPRESS=config.q_compress,
        K_COMPRESS=config.k_compress, WARPS=warps, SEVERAL_MEMBERS=int(several_members),
    )  # fmt: skip
