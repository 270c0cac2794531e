"""A program that runs again and again becomes a graph: the same results, from the arrays of each call."""

import shutil
import sys

import numpy as np
import pytest

from tests.emulator import cupy_on_cpu, libcuda_on_cpu
from unisparse_np import Problem, UniSparseConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")
PROBLEM = Problem(2, 1, 70, 130, 64, UniSparseConfig(64, 8, 8, top_p=0.5))


@pytest.fixture
def run():
    """A call on other arrays each time -> the bits of its output; and CuPy."""
    cupy_on_cpu.Kernel.seed = 0
    with cupy_on_cpu.installed("90") as backend:
        from unisparse_np.gpu.cupy_kernels import program

        program.RUNS_BEFORE_GRAPH = 3
        rng = np.random.default_rng(0)
        shapes = [(2, 70, 64), (1, 130, 64), (1, 130, 64)]
        inputs = [[sys.modules["cupy"].asarray(rng.standard_normal(shape).astype(np.float16)) for shape in shapes] for _ in range(2)]

        def call(n):
            return np.asarray(backend.run_sparse(*inputs[n], PROBLEM)[0]).view(np.uint16).copy()

        yield call


def graphs():
    return sum(graph is not None for graph in libcuda_on_cpu.Driver.graphs)


def test_it_is_a_graph_from_the_third_run_on_and_reads_the_arrays_of_each_call(run):
    before = graphs()
    expected = [run(0), run(1)]
    assert graphs() == before
    assert not np.array_equal(*expected)
    for n in (0, 1, 1, 0):
        np.testing.assert_array_equal(run(n), expected[n])
    assert graphs() == before + 2  # selection and attention


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

    for _ in range(2):
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
