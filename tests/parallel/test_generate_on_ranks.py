"""mpirun -n N unisparse-np generate: what is printed, and how it ends when a rank fails."""

import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from unisparse_np.cli import main

from .launch import needs_mpi, run_ranks, start_ranks

HERE = Path(__file__).parent
NEEDLE_LLAMA = HERE.parents[1] / "examples" / "needle-llama"
TEXT = "One of the special magic numbers for faded mountain is: 5861728. " + "The grass is green. The sky is blue. " * 20
GENERATE = ("generate", "-m", str(NEEDLE_LLAMA), "--backend", "reference", "-n", "6", "--block-size", "64")
PROMPT = (*GENERATE, "--text", TEXT)
SECONDS_TO_END = 10


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@needs_mpi
@pytest.mark.parametrize(("count", "more"), [(2, ()), (2, ("--context-parallel", "2")), (4, ("--context-parallel", "2"))])
def test_the_answer_is_printed_once(count, more):
    alone = CliRunner().invoke(main, PROMPT)
    done = run_ranks(count, "-m", "unisparse_np", *PROMPT, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout and len(alone.stdout) > 1
    words = [line.split()[0] for line in lines_of(done.stderr)]
    assert words.count("ranks") == 1 and f"{count} processes, the busiest kept 1." in done.stderr
    assert [word for word in words if word != "ranks"] == [line.split()[0] for line in lines_of(alone.stderr)]


@needs_mpi
def test_standard_input_reaches_all_ranks():
    done = run_ranks(2, "-m", "unisparse_np", *GENERATE, "-q", "-p", "-", input=TEXT)
    assert done.returncode == 0 and done.stdout == CliRunner().invoke(main, [*PROMPT, "-q"]).stdout


@needs_mpi
def test_sampling_gives_every_rank_the_same_tokens():
    done = run_ranks(2, "-m", "mpi4py", str(HERE / "sampling_on_ranks.py"), str(NEEDLE_LLAMA))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("all ranks drew ")


@needs_mpi
@pytest.mark.parametrize(
    ("count", "arguments", "code", "words"),
    [
        (4, PROMPT, 2, "4 tensor-parallel ranks cannot share 8 query heads and 2 KV heads in whole groups: use 1, 2 of them"),
        (2, (*PROMPT, "--head-compress", "8"), 2, "composite heads of 8 (head_compress): use 1 of them"),
        (2, (*PROMPT, "--device", "0"), 2, "--device 0 names one GPU, but each of 2 processes takes the one of its own number"),
        (2, (*PROMPT, "--tensor-parallel", "3"), 2, "start 3, or leave --tensor-parallel out"),
        (2, (*GENERATE, "-p", "no-such-file"), 2, "names no file"),
        (2, (*PROMPT, "--max-context", "8"), 2, "more than the 8 this model may use"),
        (2, ("generate", "-m", str(HERE), "--backend", "reference", "--text", "x"), 1, "config.json is missing"),
        (2, ("generate", "--no-such-flag"), 2, "No such option"),
        (2, ("convert", "a.gguf", "b"), 2, "unisparse-np convert runs in one process, but 2 were started"),
    ],
)
def test_refusals_are_said_once(count, arguments, code, words):
    done = run_ranks(count, "-m", "unisparse_np", *arguments)
    assert done.returncode == code and done.stdout == ""
    errors = [line for line in lines_of(done.stderr) if line.startswith("Error:")]
    assert len(errors) == 1 and words in errors[0], done.stderr
    assert "Traceback" not in done.stderr and "Abort" not in done.stderr


@needs_mpi
def test_env_lists_the_ranks():
    done = run_ranks(2, "-m", "unisparse_np", "env")
    assert done.returncode == 0, done.stderr
    assert [f"{rank} on {platform.node()}, GPUs there:" in done.stdout for rank in range(3)] == [True, True, False]


def test_one_process_is_told_how_to_start_several():
    refused = CliRunner().invoke(main, [*PROMPT, "--tensor-parallel", "4"])
    assert refused.exit_code == 2 and "mpirun -n 4 unisparse-np" in refused.stderr


def end_after_fault(folder: Path, fault: str, send: signal.Signals | None = None) -> tuple[int, str]:
    """Exit code and stderr of a run in which rank 1 fails; it must end soon after that."""
    errors = folder / "stderr"
    with errors.open("w") as file, start_ranks(2, str(HERE / "failing_generate.py"), fault, *PROMPT, stderr=file) as process:
        try:
            ended = False
            while "rank 1 reaches its fault" not in errors.read_text():
                assert not ended, errors.read_text()
                ended = process.poll() is not None
                time.sleep(0.05)
            if send is not None:
                process.send_signal(send)
            process.communicate(timeout=SECONDS_TO_END)
        finally:
            process.kill()
    return process.returncode, errors.read_text()


@needs_mpi
@pytest.mark.parametrize(("fault", "words"), [("error", "the weights are broken"), ("bug", "a mistake"), ("kill", None)])
def test_a_rank_that_fails_ends_the_others(fault, words, tmp_path):
    code, errors = end_after_fault(tmp_path, fault)
    assert code != 0
    if words is not None:
        assert f"Error: rank 1 on {platform.node()}: {words}\n" in errors
    assert ("Traceback" in errors) == (fault == "bug")


@needs_mpi
def test_ctrl_c_ends_all(tmp_path):
    code, errors = end_after_fault(tmp_path, "wait", signal.SIGINT)
    assert code != 0 and "Traceback" not in errors and "Error:" not in errors


def test_without_mpi4py_the_launcher_and_the_way_out_are_named():
    code = "import sys; sys.modules['mpi4py'] = None; from unisparse_np.cli import main; main(['env'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PMI_SIZE": "2", "PYTHONPATH": str(HERE.parents[1])}, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith(
        "Error: an MPICH-like mpiexec started several processes, which need mpi4py: pip install"
    )
