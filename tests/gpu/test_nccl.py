"""The NCCL communicator with one rank, without MPI: the calls, dtypes, strides and streams are those of many ranks."""

import ml_dtypes
import numpy as np
import pytest

from unisparse_np.errors import InvalidInput
from unisparse_np.parallel import Single

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def one_rank(cupy):
    from unisparse_np.gpu.cupy_kernels.nccl import Nccl

    cupy.cuda.Device(0).use()
    return Nccl(Single())


@pytest.fixture(params=["float16", "bfloat16", "float32", "float64"])
def x(request, cupy):
    dtype = ml_dtypes.bfloat16 if request.param == "bfloat16" else request.param
    return cupy.asarray(np.random.default_rng(1).standard_normal((3, 5, 8)).astype(dtype))


def test_the_sum_over_one_rank_is_the_array_itself(one_rank, x):
    expected = x.get()
    summed = one_rank.all_reduce(x)
    assert summed.data.ptr == x.data.ptr and summed.dtype == x.dtype
    np.testing.assert_array_equal(summed.get(), expected)


def test_gathering_adds_an_axis(one_rank, x):
    gathered = one_rank.all_gather(x)
    assert gathered.shape == (1, *x.shape) and gathered.dtype == x.dtype
    np.testing.assert_array_equal(gathered.get()[0], x.get())


def test_strided_arrays_are_sent_in_their_own_order(one_rank, x):
    part = x.transpose(1, 0, 2)[:, :2]
    np.testing.assert_array_equal(one_rank.all_gather(part).get()[0], part.get())
    np.testing.assert_array_equal(one_rank.all_reduce(part).get(), part.get())


def test_a_call_waits_for_the_kernels_before_it_in_its_stream(one_rank, cupy):
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for size in (1 << 10, 1 << 24):
            numbers = cupy.arange(size, dtype=cupy.float32)
            gathered = one_rank.all_gather(numbers * 2)
            difference = float(cupy.abs(gathered[0] - 2 * numbers).max())
            stream.synchronize()
            assert difference == 0


def test_calls_can_be_captured_in_a_graph(one_rank, cupy):
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.zeros(1 << 12, dtype=cupy.float32)
        one_rank.all_reduce(x)
        stream.begin_capture()
        x += 1
        one_rank.all_reduce(x)
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch(stream)
        stream.synchronize()
        assert (x.get() == 3).all()


def test_objects_travel_over_the_host(one_rank):
    assert one_rank.broadcast({"token": 7}) == {"token": 7} and (one_rank.rank, one_rank.size) == (0, 1)


def test_a_rank_takes_the_device_of_its_number(cupy):
    from unisparse_np.gpu.cupy_kernels.nccl import take_device

    take_device(0, 1)
    assert cupy.cuda.Device().id == 0
    devices = cupy.cuda.runtime.getDeviceCount()
    with pytest.raises(InvalidInput, match=f"{devices + 1} ranks on a machine with {devices} visible GPUs"):
        take_device(0, devices + 1)
