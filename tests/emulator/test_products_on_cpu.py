"""What a plan of cuBLASLt makes it gives back: when the cache drops the plan, and when it cannot be made."""

import gc
import shutil
import sys
from functools import lru_cache

import numpy as np
import pytest

from tests.emulator import cupy_on_cpu
from unisparse_np import BackendUnavailable

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")


class Library:
    """cuBLASLt as far as a plan goes: counts what it has made and not destroyed. `found` is how many algorithms it knows."""

    def __init__(self):
        self.alive, self.made, self.found = [], 0, 1

    def _create(self, handle, *_):
        self.made += 1
        handle._obj.value = self.made
        self.alive.append(self.made)
        return 0

    def _destroy(self, handle):
        self.alive.remove(handle.value)
        return 0

    cublasLtMatmulDescCreate = cublasLtMatrixLayoutCreate = cublasLtMatmulPreferenceCreate = _create
    cublasLtMatmulDescDestroy = cublasLtMatrixLayoutDestroy = cublasLtMatmulPreferenceDestroy = _destroy

    def cublasLtMatmulDescSetAttribute(self, *_):
        return 0

    cublasLtMatmulPreferenceSetAttribute = cublasLtMatmul = cublasLtMatmulDescSetAttribute

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments):
        arguments[-1]._obj.value = self.found
        return 0


@pytest.fixture
def library(monkeypatch):
    with cupy_on_cpu.installed("90"):
        from unisparse_np.gpu.cupy_kernels import products

        library = Library()
        monkeypatch.setattr(products, "_library", lambda: library)
        monkeypatch.setattr(products, "_handle", lambda device: 0)
        yield library


def test_a_plan_that_the_cache_drops_is_destroyed(library):
    from unisparse_np.gpu.cupy_kernels import products

    plan_of = lru_cache(maxsize=2)(lambda tokens: products.ProductPlan(8, 16, tokens, 0, 0, 256))
    for tokens in (1, 2, 3, 4):
        plan_of(tokens)(0, 0, 0, add=False)
    gc.collect()
    assert library.made == 4 * 5  # an operation, three layouts and a preference each
    assert len(library.alive) == 2 * 5
    plan_of.cache_clear()
    gc.collect()
    assert library.alive == []


def test_a_plan_that_cannot_be_made_leaves_nothing(library):
    from unisparse_np.gpu.cupy_kernels import products

    library.found = 0
    with pytest.raises(BackendUnavailable, match=r"cuBLASLt has no way to multiply \[5, 16\] by \[16, 8\] on this GPU"):
        products.ProductPlan(8, 16, 5, *(products._TYPES[np.dtype(np.float16)],) * 2, 256)
    gc.collect()
    assert library.alive == []
