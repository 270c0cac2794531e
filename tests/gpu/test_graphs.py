"""Calls that come again and again over the same memory run as a CUDA graph: on a real device, the same results as single launches."""

import ml_dtypes
import numpy as np
import pytest

from unisparse_np import Problem, UniSparseConfig

pytestmark = pytest.mark.gpu
TWO_SIZES = UniSparseConfig(64, 4, 2, top_p=0.5, row_threshold=0.1, top_p_compress=8)


@pytest.fixture(params=[UniSparseConfig(top_p=0.5), TWO_SIZES], ids=["one size", "two sizes"])
def calls(request, cupy):
    """Three functions that each run a call on arrays of its own -> out, and what single launches gave for them."""
    from unisparse_np.gpu.cupy_kernels import program, run_sparse
    from unisparse_np.gpu.cupy_kernels.plan import forget_plans, plan_of

    problem = Problem(4, 2, 300, 500, 128, request.param)
    rng = np.random.default_rng(0)
    inputs = [
        [
            cupy.asarray(rng.standard_normal((heads, length, 128)).astype(ml_dtypes.bfloat16))
            for heads, length in ((4, 300), (2, 500), (2, 500))
        ]
        for _ in range(3)
    ]
    runs = [lambda x=x: run_sparse(*x, problem)[0] for x in inputs]
    forget_plans()
    expected = [bits(run(), cupy) for run in runs]
    for _ in range(program.RUNS_BEFORE_GRAPH + 2):  # the first may find other blocks of the pool free than those that follow
        runs[0]()
    assert all(recorded._graph is not None for recorded in plan_of(problem).programs.values())
    return runs, expected


def bits(out, cupy):
    return cupy.asnumpy(out).view(np.uint16)


def test_each_call_reads_its_own_arrays(calls, cupy):
    runs, expected = calls
    for n in (0, 1, 2, 2, 0, 1):
        np.testing.assert_array_equal(bits(runs[n](), cupy), expected[n])


def test_calls_under_way_at_once_keep_their_parameters(calls, cupy):
    runs, expected = calls
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in runs]
    cupy.cuda.Device().synchronize()
    for _ in range(20):
        outs = []
        for stream, run in zip(streams, runs, strict=True):
            with stream:
                outs.append(run())
        for stream, out, want in zip(streams, outs, expected, strict=True):
            stream.synchronize()
            np.testing.assert_array_equal(bits(out, cupy), want)


def test_a_call_can_be_captured_in_a_graph_of_the_caller(calls, cupy):
    runs, expected = calls
    with cupy.cuda.Stream(non_blocking=True) as stream:
        runs[1]()  # the memory that the capture takes is in the stream's pool
        stream.begin_capture()
        out = runs[1]()
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    np.testing.assert_array_equal(bits(out, cupy), expected[1])
