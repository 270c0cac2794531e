"""What the CuPy backend says where it cannot run: an old GPU, no device, an old driver, too little memory."""

import shutil
import sys
import types

import numpy as np
import pytest

from tests.emulator import cupy_on_cpu
from unisparse_np import BackendUnavailable, InvalidInput, Problem, UniSparseConfig, unisparse_attention

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")

PROBLEM = Problem(2, 1, 4096, 4096, 64)
CONFIGS = [
    UniSparseConfig(), UniSparseConfig.balanced(), UniSparseConfig.precise(),
    *(UniSparseConfig(q_compress=c, k_compress=c) for c in (4, 16, 32)),
    UniSparseConfig(q_compress=8, k_compress=32), UniSparseConfig(block_size=64, q_compress=2, k_compress=4, key_anchors=8),
    UniSparseConfig(64, 4, 2, top_p=0.95, row_threshold=0.02, top_p_compress=8),
]  # fmt: skip


def arrays(problem):
    asarray = sys.modules["cupy"].asarray
    shapes = ((problem.num_q_heads, problem.q_len), *2 * [(problem.num_kv_heads, problem.k_len)])
    return [asarray(np.zeros((*shape, problem.head_dim), np.float16)) for shape in shapes]


def test_a_gpu_that_is_too_old():
    with (
        cupy_on_cpu.installed("75") as backend,
        pytest.raises(BackendUnavailable, match=r"compute capability 7\.5 and the kernels need 8\.0"),
    ):
        backend.run_sparse(*arrays(PROBLEM), PROBLEM)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("cudaErrorNoDevice: no CUDA-capable device is detected", "check nvidia-smi"),
        ("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version", "update the driver"),
    ],
)
def test_no_device_and_a_driver_older_than_cupys_cuda(error, advice):
    def fail():
        raise sys.modules["cupy"].cuda.runtime.CUDARuntimeError(error)

    x = np.zeros((1, 10, 64), np.float16)
    with cupy_on_cpu.installed("90"):
        sys.modules["cupy"].cuda.runtime.getDevice = fail
        with pytest.raises(BackendUnavailable, match=advice) as found:
            unisparse_attention(x, x, x, backend="cupy")
        assert error in str(found.value)


def test_arrays_of_another_gpu_than_the_current_one():
    """Kernels would run on one and read the other's memory, which takes the process's GPU down."""
    with cupy_on_cpu.installed("90") as backend:
        q, k, v = arrays(PROBLEM)
        assert backend.from_any("q", q) is q
        sys.modules["cupy"].cuda.runtime.getDevice = lambda: 1
        with pytest.raises(InvalidInput, match=r"^q lies on GPU 0, but the current device is GPU 1: call inside `with cupy.cuda.Device\(0"):
            unisparse_attention(q, k, v, backend="cupy")


def test_a_driver_without_tensor_maps():
    with cupy_on_cpu.installed("90") as backend:
        device = sys.modules["unisparse_np.gpu.cupy_kernels.device"]
        device.driver = lambda: types.SimpleNamespace(cuTensorMapEncodeTiled=lambda *_: 801)
        with pytest.raises(BackendUnavailable, match="CUresult 801: the driver may be older than CUDA 12, update it"):
            backend.run_dense(*arrays(PROBLEM), PROBLEM)


def test_memory_that_does_not_suffice_names_the_bytes_and_a_chunk_that_fits():
    def alloc(size):
        raise sys.modules["cupy"].cuda.memory.OutOfMemoryError(f"Out of memory allocating {size:,} bytes")

    with cupy_on_cpu.installed("80") as backend:
        cuda = sys.modules["cupy"].cuda
        inputs = arrays(PROBLEM)
        cuda.alloc = alloc
        cuda.runtime.memGetInfo = lambda: (1 << 20, 1 << 34)
        for run in (backend.run_sparse, backend.run_dense):
            with pytest.raises(BackendUnavailable, match=r"allocating [\d,]+ bytes.*chunks of (\d+) tokens") as found:
                run(*inputs, PROBLEM)
            chunk = int(str(found.value).split("chunks of ")[1].split()[0])
            assert 128 <= chunk < 4096 and chunk % 128 == 0


def test_memory_in_pieces_gets_a_smaller_chunk_even_where_enough_is_free():
    def alloc(size):
        raise sys.modules["cupy"].cuda.memory.OutOfMemoryError(f"Out of memory allocating {size:,} bytes")

    with cupy_on_cpu.installed("80") as backend:
        inputs = arrays(PROBLEM)
        sys.modules["cupy"].cuda.alloc = alloc
        with pytest.raises(BackendUnavailable, match="chunks of 2048 tokens"):
            backend.run_sparse(*inputs, PROBLEM)


def test_a_gpu_with_too_little_shared_memory(monkeypatch):
    monkeypatch.setitem(cupy_on_cpu.ATTRIBUTES, "MaxSharedMemoryPerBlockOptin", 99 << 10)  # compute capability 8.6 and 8.9
    problem = Problem(1, 1, 64, 64, 256)
    with (
        cupy_on_cpu.installed("86") as backend,
        pytest.raises(BackendUnavailable, match="101376 bytes of shared memory and the kernel score_blocks needs 135168"),
    ):
        backend.run_sparse(*arrays(problem), problem)


def test_a_compiled_kernel_belongs_to_one_device():
    with cupy_on_cpu.installed("90"):
        device = sys.modules["unisparse_np.gpu.cupy_kernels.device"]
        kernel = device.kernel("finite.cu", "find_not_finite", 0, IS_FLOAT16=1, IS_FLOAT32=0)
        assert device.kernel("finite.cu", "find_not_finite", 0, IS_FLOAT16=1, IS_FLOAT32=0) is kernel
        sys.modules["cupy"].cuda.runtime.getDevice = lambda: 1
        assert device.kernel("finite.cu", "find_not_finite", 0, IS_FLOAT16=1, IS_FLOAT32=0) is not kernel


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("q_len", "k_len"), [(8192, 8192), (8192, 131072), (32768, 1 << 20)])
def test_the_estimate_of_an_attention_call_is_not_below_what_it_allocates(capability, config, q_len, k_len):
    problem = Problem(32, 8, q_len, k_len, 128, config)
    with cupy_on_cpu.installed(capability):
        attend, memory, plan, run = (sys.modules[f"unisparse_np.gpu.cupy_kernels.{name}"] for name in ("attend", "memory", "plan", "run"))
        shapes = plan.plan_of(problem)
        stages = max(run.selection_layout(shapes).offsets["kc"], attend.work_layout(shapes).size)  # one after the other
        mask = 4 * (np.prod(shapes.words_shape) + np.prod(shapes.words_shape[:2]) + np.prod(shapes.anchors_shape))
        out = 2 * np.prod(shapes.out_shape) + 4 * np.prod(shapes.out_shape[:2])
        assert memory.attention_bytes(problem, 2, sparse=True) >= stages + mask + out
        assert memory.attention_bytes(problem, 2, sparse=False) >= attend.work_layout(shapes).size + out - 5 * 256  # pieces end on 256


def test_a_row_threshold_needs_peaks():
    problem = Problem(1, 1, 64, 64, 64, UniSparseConfig(64, 8, 8, row_threshold=0.1))
    with cupy_on_cpu.installed("90") as backend, pytest.raises(InvalidInput, match="peak is None, but row_threshold is set"):
        backend.select_blocks(sys.modules["cupy"].zeros((1, 1, 1), np.float32), None, problem)
