"""The matrix product that two kernels share: a tile of rows times a tile of keys, in shared memory and registers.

A CUDA block of THREADS x THREADS threads computes the tile `sums[row, key] = sum over dims of a[row, dim] * b[key, dim]`.

* Shared memory holds a *slice* of the tile: all rows and all keys, but only SLICE dims of them, so any head_dim fits.
* Thread (ty, tx) owns the ROWS rows from ty * ROWS on and the KEYS keys from tx * KEYS on: a small square in registers. One
  number read from shared memory is used once for each row (or key) of the square, which is what makes the kernel fast: a
  thread a score would read two numbers for every multiplication.
* A slice is stored dim by dim, [SLICE, rows + PAD]: what a thread needs of one dim lies side by side, on a boundary of 16
  bytes, and the compiler makes one instruction of four reads. With the extra places, columns (which are written) fall on
  different banks of shared memory.

In Numba's simulator a thread is a Python thread, so tiles are small there. The kernels are the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import config, cuda

IN_SIMULATOR = bool(config.ENABLE_CUDASIM)
PAD = 4  # extra places at the end of a row in shared memory; four numbers, so that the next row begins on 16 bytes again
ALIGNMENT = None if IN_SIMULATOR else 16  # bytes; the simulator has no say in it


class Tile(NamedTuple):
    """Sizes that a kernel is compiled for.

    threads: along each side of the CUDA block. rows, keys: owned by one thread. slice: dims held in shared memory.
    value_keys: keys whose values are held in shared memory.
    """

    threads: int
    rows: int
    keys: int
    slice: int
    value_keys: int


def attention_tile(real: type, head_dim: int) -> Tile:
    """Step 6: as large as 48 KB of shared memory and 255 registers a thread allow."""
    if IN_SIMULATOR:
        return Tile(threads=2, rows=4, keys=4, slice=16, value_keys=8)
    if real is np.float64:
        return Tile(threads=16, rows=2, keys=2, slice=16, value_keys=8 if head_dim <= 128 else 4)
    return Tile(threads=16, rows=4, keys=4, slice=32, value_keys=16 if head_dim <= 128 else 8)


def score_tile(real: type) -> Tile:
    """Steps 2-3: a query block has few composite rows (16 by default), so a thread owns one row of many keys."""
    if IN_SIMULATOR:
        return Tile(threads=2, rows=2, keys=4, slice=16, value_keys=0)
    return Tile(threads=16, rows=1, keys=4, slice=32 if real is np.float32 else 16, value_keys=0)


@cache
def slice_loader(tile: Tile) -> Any:
    """Device functions that bring SLICE dims of some rows of an array into shared memory, in two steps.

    fetch_slice: held[m, d] = source[positions[ty + m * THREADS], start + tx + d * THREADS], 0 where there is none. All of a
    thread's loads are under way before the first of them is waited for. Neighbouring threads read neighbouring dims.
    keep_slice: the same numbers to their places, target [SLICE, rows].
    """
    THREADS, DIMS = tile.threads, tile.slice // tile.threads

    @cuda.jit(device=True)
    def fetch_slice(held, source, positions, start, head_dim, ty, tx):
        for m in range(positions.size // THREADS):
            position = positions[ty + m * THREADS]
            exists = position >= 0
            row = source[np.uint32(position) if exists else np.uint32(0)]
            for d in range(DIMS):
                dim = np.uint32(start) + tx + d * THREADS
                if exists and dim < head_dim:
                    held[m, d] = row[dim]
                else:
                    held[m, d] = 0

    @cuda.jit(device=True)
    def keep_slice(target, held, ty, tx):
        for m in range(held.shape[0]):
            for d in range(DIMS):
                target[tx + d * THREADS, ty + m * THREADS] = held[m, d]

    return fetch_slice, keep_slice


@cache
def product_adder(tile: Tile) -> Any:
    """Device function: sums [ROWS, KEYS] += this slice's products, for the rows and keys of thread (ty, tx).

    They are summed in `part` [ROWS, KEYS] first: short running sums round less.
    """
    ROWS, KEYS, SLICE = tile.rows, tile.keys, tile.slice

    @cuda.jit(device=True)
    def add_products(sums, part, row_slice, key_slice, ty, tx):
        for m in range(ROWS):
            for n in range(KEYS):
                part[m, n] = 0
        dim = 0
        while dim < SLICE:  # not range: through it the compiler loses sight of dim >= 0 and works out every address anew
            for m in range(ROWS):
                for n in range(KEYS):  # both are unrolled, and each row and key is read once
                    part[m, n] += row_slice[dim, ty * ROWS + m] * key_slice[dim, tx * KEYS + n]
            dim += 1
        for m in range(ROWS):
            for n in range(KEYS):
                sums[m, n] += part[m, n]

    return add_products
