"""Every CUDA source compiles by NVRTC, without a GPU: no spills where it matters, and room for the thread blocks that are meant."""

import re

import pytest

from tests.emulator import cupy_on_cpu

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and nvidia-cuda-nvrtc")

HOPPER = "sm_90a"


def cases(architecture):
    """(file, architecture, defines, kernel, registers at most, spilled bytes at most) of the portable kernels."""
    # two m16 tiles a warp at d 128 leave no register free: a few words of loop control are spilled
    yield "attend_sm80.cu", architecture, {"HEAD_DIM": 128, "BLOCK_SIZE": 128}, "attend_sm80", 255, 96
    yield "scores.cu", architecture, {"HEAD_DIM": 128, "QUERIES_PER_BLOCK": 16, "KEYS_PER_BLOCK": 16}, "score_blocks", 255, 0
    yield "compress.cu", architecture, {"HEAD_DIM": 128, "BLOCK_SIZE": 128}, "compress", 80, 0
    yield "select.cu", architecture, {}, "select_blocks", 64, 0
    yield "schedule.cu", architecture, {}, "schedule", 64, 0
    yield "repair.cu", architecture, {"HEAD_DIM": 128}, "repair", 128, 0


def hopper_cases():
    """The same of the kernels that only Hopper runs."""
    for size, dim in ((64, 64), (128, 128)):
        yield "attend_sm90.cu", HOPPER, {"HEAD_DIM": dim, "BLOCK_SIZE": size}, "attend_sm90", 168 if size > 64 else 128, 0
    for q, k in ((16, 16),):
        yield "scores_sm90.cu", HOPPER, {"HEAD_DIM": 128, "QUERIES_PER_BLOCK": q, "KEYS_PER_BLOCK": k}, "score_tiles", 96, 0


CASES = [*hopper_cases(), *cases("sm_80")]
MORE_CASES = [
    *cases(HOPPER),
    *cases("sm_100"),
    *(("attend_sm90.cu", HOPPER, {"HEAD_DIM": d, "BLOCK_SIZE": s}, "attend_sm90", 168, 0) for s, d in ((64, 128), (128, 64), (256, 128))),
    *(("attend_sm80.cu", "sm_80", {"HEAD_DIM": d, "BLOCK_SIZE": s}, "attend_sm80", 255, 0) for s, d in ((64, 64), (128, 64), (128, 256))),
    ("scores.cu", "sm_80", {"HEAD_DIM": 64, "QUERIES_PER_BLOCK": 64, "KEYS_PER_BLOCK": 1}, "score_blocks", 255, 0),
]


def name_of(case):
    return "-".join(map(str, (case[0], case[1], *case[2].values())))


@pytest.fixture(scope="module")
def source():
    with cupy_on_cpu.installed("80"):
        from unisparse_np.gpu.cupy_kernels import device

        yield device.source


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=name_of)
def test_compiles_without_spills(case, source):
    file, architecture, defines, kernel, most_registers, most_spilled = case
    log = compile_log(source(file), file, architecture, {"IS_FLOAT16": 0} | defines)
    assert "C75" not in log, log  # ptxas: wgmma serialised, or setmaxnreg ignored
    usage = resources(log)[kernel]
    assert usage["registers"] <= most_registers, log
    assert usage["spilled"] <= most_spilled, log


def test_every_source_is_compiled_here():
    assert {case[0] for case in CASES} == {path.name for path in cupy_on_cpu.SOURCES.glob("*.cu")}


def compile_log(code, name, architecture, defines):
    """NVRTC's and ptxas' own words; fails the test with them when the code does not compile."""
    options = [f"-arch={architecture}", "-std=c++17", "-ftz=true", "--ptxas-options=-v", "--device-as-default-execution-space"]
    options += [f"-D{key}={value}" for key, value in defines.items()]
    status, program = nvrtc.nvrtcCreateProgram(code.encode(), name.encode(), 0, [], [])
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(program)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    return log.decode()


def resources(log):
    """{kernel: registers and spilled bytes} from ptxas -v."""
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    found = re.findall(pattern, log, re.DOTALL)
    return {name: {"registers": int(registers), "spilled": max(int(stores), int(loads))} for name, stores, loads, registers in found}
