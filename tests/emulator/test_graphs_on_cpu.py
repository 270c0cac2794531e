"""A program that runs again and again over the same memory becomes a graph, and single launches again when the memory is another."""

import shutil
import sys

import numpy as np
import pytest

from tests.emulator import cupy_on_cpu, libcuda_on_cpu
from unisparse_np import Problem, UniSparseConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")
PROBLEM = Problem(2, 1, 70, 130, 64, UniSparseConfig(64, 8, 8, top_p=0.5))


@pytest.fixture
def run(monkeypatch):
    """A call over one of two sets of inputs -> the bits of its output. All else lies where the call before had it, as in CuPy's pool."""
    cupy_on_cpu.Kernel.seed = 0
    with cupy_on_cpu.installed("90") as backend:
        from unisparse_np.gpu.cupy_kernels import program

        program.RUNS_BEFORE_GRAPH = 3
        cupy = sys.modules["cupy"]
        rng = np.random.default_rng(0)
        shapes = [(2, 70, 64), (1, 130, 64), (1, 130, 64)]
        inputs = [[cupy.asarray(rng.standard_normal(shape).astype(np.float16)) for shape in shapes] for _ in range(2)]
        pool: list[cupy_on_cpu.MemoryPointer] = []

        def call(n):
            left = iter(list(pool))

            def alloc(size):
                again = next(left, None)
                if again is None:
                    pool.append(again := cupy_on_cpu.alloc(size))
                return again

            monkeypatch.setattr(cupy.cuda, "alloc", alloc)
            return np.asarray(backend.run_sparse(*inputs[n], PROBLEM)[0]).view(np.uint16).copy()

        yield call


def graphs():
    return sum(graph is not None for graph in libcuda_on_cpu.Driver.graphs)


def test_it_is_a_graph_from_the_fourth_run_over_the_same_memory_on(run):
    before = graphs()
    expected = [run(0) for _ in range(3)][-1]
    assert graphs() == before
    for _ in range(2):
        np.testing.assert_array_equal(run(0), expected)
    assert graphs() == before + 2  # selection and attention


def test_other_arrays_get_single_launches_and_their_own_results(run):
    before = graphs()
    expected = [run(0), run(1)]
    assert not np.array_equal(*expected)
    for n in (0, 1) * 3:
        np.testing.assert_array_equal(run(n), expected[n])
    assert graphs() == before
    for _ in range(4):
        run(0)
    assert graphs() == before + 2
    np.testing.assert_array_equal(run(1), expected[1])
    assert graphs() == before
    np.testing.assert_array_equal(run(0), expected[0])


def test_a_captured_stream_gets_single_launches(run):
    for _ in range(4):
        expected = run(0)
    stream = sys.modules["cupy"].cuda.Stream()
    stream.begin_capture()
    run(0)
    assert len(stream.end_capture().launches) == 6
    np.testing.assert_array_equal(run(0), expected)


def test_a_call_that_libcuda_refuses_is_one_sentence(run, monkeypatch):
    from unisparse_np import BackendUnavailable

    for _ in range(3):
        run(0)
    monkeypatch.setattr(libcuda_on_cpu.Driver, "cuGraphLaunch", staticmethod(lambda *_: 700))
    with pytest.raises(BackendUnavailable, match="cuGraphLaunch failed with CUresult 700"):
        run(0)


def test_where_no_memory_is_left_for_a_graph_launches_stay_single(run, monkeypatch):
    before = graphs()
    monkeypatch.setattr(libcuda_on_cpu.Driver, "cuGraphInstantiateWithFlags", staticmethod(lambda *_: 2))
    expected = run(0)
    for _ in range(4):
        np.testing.assert_array_equal(run(0), expected)
    assert graphs() == before
