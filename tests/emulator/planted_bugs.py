"""A bug planted in a copy of the CUDA sources, and checks that must notice it."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.emulator import cupy_on_cpu

ROOT = Path(__file__).parents[2]


def assert_caught(planted, checks, tmp_path):
    """Plant a bug, (file, good, bad), and run checks, in a process of its own: the emulator ends it at a deadlock or a wrong access.

    checks: Python that fails when it notices; sys is imported. Returns the finished process.
    """
    file, good, bad = planted
    folder = tmp_path / "cuda"
    shutil.copytree(cupy_on_cpu.SOURCES, folder)
    text = (folder / file).read_text()
    assert text.count(good) == 1
    (folder / file).write_text(text.replace(good, bad))
    program = (
        f"import pathlib, sys\nfrom tests.emulator import cupy_on_cpu\ncupy_on_cpu.Kernel.folder = pathlib.Path(sys.argv[1])\n{checks}"
    )
    result = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode != 0, "the bug went unseen"
    assert "CalledProcessError" not in result.stderr, "the bug does not compile"
    return result
