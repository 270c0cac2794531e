"""What every command does with an error that is nobody's bug."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from unisparse_np.cli import COMMANDS, main


@pytest.mark.parametrize(
    ("error", "said"), [(MemoryError("Unable to allocate\n3 GiB"), "(Unable to allocate 3 GiB)"), (MemoryError(), "(MemoryError)")]
)
def test_memory_that_ran_out_is_one_sentence(error: MemoryError, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory() -> None:
        raise error

    monkeypatch.setattr("unisparse_np.cli.env.collect", no_memory)
    result = CliRunner().invoke(main, ["env"])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == f"Error: memory ran out {said}: give less text at once, or end what else uses the memory\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
@pytest.mark.parametrize("arguments", [["--help"], ["env"], ["bench", "--length", "256", "--quiet", "--json"]])
def test_a_full_disk_is_one_sentence(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run([sys.executable, "-m", "unisparse_np", *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == "Error: the output cannot be written (No space left on device): free some space, or send it elsewhere\n"


def test_each_command_fits_its_line_of_the_help() -> None:
    commands = CliRunner().invoke(main, ["--help"], terminal_width=80).stdout.partition("Commands:")[2]
    assert commands.count("\n") == 1 + len(COMMANDS) and "..." not in commands


def test_a_picked_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisparse_np.attention.choose_backend", lambda: ("reference", "NumPy; no GPU"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    result = CliRunner().invoke(main, ["audit", "--device", "0"])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == "Error: --device 0 picks a GPU, but none can be used here (NumPy; no GPU): leave it out to run without one\n"
