"""The tests of this folder need a CUDA device and CuPy; without them they are skipped."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def cupy():
    module = pytest.importorskip("cupy")
    if module.cuda.runtime.getDeviceCount() == 0:
        pytest.skip("no CUDA device")
    return module


@pytest.fixture(params=["native", "sm80"])
def path(request, monkeypatch, cupy):
    """Both attention kernels: the one this device gets, and the portable one."""
    from unisparse_np.gpu.cupy_kernels import attend

    if request.param == "sm80":
        monkeypatch.setattr(attend, "HOPPER_HEAD_DIMS", ())
    return request.param
