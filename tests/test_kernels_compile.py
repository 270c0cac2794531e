"""Every CUDA source compiles by NVRTC, without a GPU: no spills where it matters, and room for the thread blocks that are meant."""

import re

import pytest

from tests.emulator import cupy_on_cpu

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and nvidia-cuda-nvrtc")

HOPPER = "sm_90a"


def cases(architecture):
    """(file, architecture, defines, kernel, registers at most, spilled bytes at most) of the portable kernels."""
    yield "attend_sm80.cu", architecture, {"HEAD_DIM": 128, "BLOCK_SIZE": 128}, "attend_sm80", 255, 0  # two thread blocks of 4 warps
    yield "scores.cu", architecture, {"HEAD_DIM": 128, "QUERIES_PER_BLOCK": 16, "KEYS_PER_BLOCK": 16}, "score_blocks", 255, 0
    yield "compress.cu", architecture, {"HEAD_DIM": 128, "BLOCK_SIZE": 128}, "compress", 80, 0
    yield "select.cu", architecture, {}, "select_blocks", 64, 0
    yield "prepare.cu", architecture, {"HEAD_DIM": 128}, "prepare", 64, 0
    yield "decode_attention.cu", architecture, {"HEAD_DIM": 128, "ROW_TILES": 1}, "decode_attention", 168, 0  # two thread blocks
    yield (
        "decode_select.cu",
        architecture,
        {"HEAD_DIM": 128, "ROW_TILES": 1, "BLOCK_SIZE": 128, "KEYS_PER_BLOCK": 16, "COARSE": 1},
        "decode_scores",
        80,
        0,
    )
    coarse = {"HEAD_DIM": 128, "ROW_TILES": 1, "BLOCK_SIZE": 64, "KEYS_PER_BLOCK": 32, "COARSE": 4}
    yield "decode_select.cu", architecture, coarse, "decode_scores", 80, 0
    yield "decode_select.cu", architecture, coarse, "decode_select", 64, 0
    yield "repair.cu", architecture, {"HEAD_DIM": 128}, "repair", 128, 0
    yield from plain_cases(architecture, 128, 64, 16)
    yield from layer_cases(architecture)


def layer_cases(architecture):
    """The same of the model's layers, for rows of 4,096 numbers."""
    yield "layers.cu", architecture, {"WIDTH": 4096, "THREADS": 256}, "rms_norm", 64, 0
    pooling = {"HEAD_DIM": 128, "BLOCK_SIZE": 128, "Q_COMPRESS": 8, "K_COMPRESS": 8, "WARPS": 4, "SEVERAL_MEMBERS": 0}
    yield "rotary.cu", architecture, pooling, "rotate_heads", 128, 0
    yield "gemv.cu", architecture, {"WIDTH": 4096, "THREADS": 256}, "norm_gemv_swiglu", 128, 0
    yield "gemv.cu", architecture, {"WIDTH": 14336, "THREADS": 512}, "norm_gemv_swiglu", 128, 0  # as threads_without_spills has it
    yield "finite.cu", architecture, {}, "find_not_finite", 32, 0
    yield "sample.cu", architecture, {}, "find_largest", 64, 0
    yield "draw.cu", architecture, {}, "draw", 64, 0


def plain_cases(architecture, dim, rows, query_rows):
    """The same of the plain kernels, in float32; two thread blocks of 256 threads fit a multiprocessor."""
    most_spilled = 96 if architecture == "sm_100" else 0  # a few of the loop's numbers, where as many registers are used as there are
    yield "plain_attend.cu", architecture, {"HEAD_DIM": dim, "TILE_ROWS": rows, "IS_FLOAT32": 1}, "attend_plain", 128, most_spilled
    yield "plain_scores.cu", architecture, {"HEAD_DIM": dim, "TILE_ROWS": query_rows}, "score_plain", 128, 0
    yield "plain_compress.cu", architecture, {"HEAD_DIM": dim, "IS_FLOAT32": 1}, "pool_plain", 64, 0


def hopper_cases():
    """The same of the kernels that only Hopper runs."""
    for size, dim in ((64, 64), (128, 128)):
        registers = 128 if dim == 64 else 168  # at the launch; then the warpgroups exchange theirs
        yield "attend_sm90.cu", HOPPER, {"HEAD_DIM": dim, "BLOCK_SIZE": size}, "attend_sm90", registers, 0
    for q, k in ((16, 16), (4, 4), (16, 32)):
        yield "scores_sm90.cu", HOPPER, {"HEAD_DIM": 128, "QUERIES_PER_BLOCK": q, "KEYS_PER_BLOCK": k}, "score_tiles", 96, 0


CASES = [*hopper_cases(), *cases("sm_80")]
MORE_CASES = [
    *cases(HOPPER),
    *cases("sm_100"),
    *(
        ("attend_sm90.cu", HOPPER, {"HEAD_DIM": d, "BLOCK_SIZE": s}, "attend_sm90", 168, 0)
        for s, d in ((64, 96), (64, 128), (128, 64), (128, 96), (128, 256), (256, 64), (256, 128))
    ),
    *(
        ("attend_sm80.cu", "sm_80", {"HEAD_DIM": d, "BLOCK_SIZE": s}, "attend_sm80", 255, 0)
        for s, d in ((64, 64), (128, 64), (64, 128), (128, 80), (128, 256))
    ),
    ("decode_attention.cu", "sm_80", {"HEAD_DIM": 256, "ROW_TILES": 1}, "decode_attention", 255, 0),
    ("decode_attention.cu", "sm_80", {"HEAD_DIM": 128, "ROW_TILES": 2}, "decode_attention", 255, 0),
    *plain_cases("sm_80", 64, 64, 32),
    *plain_cases("sm_80", 256, 32, 32),
    *plain_cases(HOPPER, 18, 16, 16),
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
