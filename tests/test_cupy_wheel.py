"""The real CuPy, from the wheel that the `gpu` extra names, on a machine without a GPU: it imports, its NVRTC compiles every kernel of
the backend, and asking for the device ends in one clear sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

PROGRAM = """
import cupy
import numpy as np
from unisparse_np import BackendUnavailable, unisparse_attention
from unisparse_np.gpu import cupy_kernels
from unisparse_np.gpu.cupy_kernels import device
from tests.test_kernels_compile import CASES

nvrtc = cupy.cuda.nvrtc
for file, architecture, defines, kernel, *_ in CASES:
    options = ["-std=c++17", "-ftz=true", f"-arch={architecture}"]
    options += [f"-D{name}={value}" for name, value in ({"IS_FLOAT16": 0} | defines).items()]
    program = nvrtc.createProgram(device.source(file), file, (), ())
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        raise SystemExit(f"{file} {options}: {nvrtc.getProgramLog(program)}")
    assert len(nvrtc.getCUBIN(program)) > 0
    nvrtc.destroyProgram(program)
print("compiled", len(CASES))

if not cupy.cuda.is_available():
    x = np.zeros((1, 10, 64), np.float16)
    try:
        unisparse_attention(x, x, x, backend="cupy")
    except BackendUnavailable as error:
        print(error)
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CuPy's wheel; everything else it needs is installed with the tests."""
    folder = tmp_path_factory.mktemp("cupy")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
        "cupy-cuda12x>=14.0",
        "cuda-pathfinder",
    ]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cupy-cuda12x could not be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder


def test_the_wheel_imports_and_compiles_every_kernel(packages: Path, tmp_path: Path):
    pytest.importorskip("nvidia.cuda_nvrtc", reason="needs nvidia-cuda-nvrtc-cu12")
    paths = os.pathsep.join([str(packages), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "CUPY_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compiled" in done.stdout
    if not Path("/dev/nvidia0").exists():
        assert "CuPy finds no usable CUDA device" in done.stdout
        assert "use backend='reference'" in done.stdout
