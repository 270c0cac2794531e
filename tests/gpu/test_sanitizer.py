"""compute-sanitizer on whole calls of the backend (tests/gpu/sanitized.py), and what its tools cannot follow."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNS = [
    *((tool, case) for tool in ("memcheck", "racecheck") for case in ("native", "portable", "decode")),
    *(("initcheck", case) for case in ("portable", "native finite", "decode")),
    ("racecheck", "record"), ("racecheck", "record read by one lane"),
]  # fmt: skip

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")]


@pytest.fixture(scope="module")
def reports(cupy):
    """Every tool and case at once -> what the tool printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(tool, case):
        program = [sys.executable, "-m", "tests.gpu.sanitized", case]
        command = ["compute-sanitizer", "--tool", tool, "--print-limit", "1000", "--show-backtrace", "no", *program]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment)

    running = {run: start(*run) for run in RUNS}
    printed = {run: process.communicate()[0] for run, process in running.items()}
    for run, text in printed.items():
        assert re.search(r"^done$", text, re.MULTILINE), (run, text[-2000:])  # the program itself ran to its end
    return printed


def problems(text):
    """The count in a tool's last line."""
    return int(
        re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text)[-1][0] or re.findall(r"(\d+) hazard", text)[-1]
    )


@pytest.mark.parametrize("case", ["native", "portable", "decode"])
def test_every_access_is_inside_its_array(case, reports):
    assert problems(reports["memcheck", case]) == 0, reports["memcheck", case][-3000:]


@pytest.mark.parametrize("case", ["portable", "decode"])
def test_portable_and_decode_kernels_have_no_races_and_read_nothing_unwritten(case, reports):
    assert problems(reports["racecheck", case]) == 0, reports["racecheck", case][-3000:]
    assert problems(reports["initcheck", case]) == 0, reports["initcheck", case][-3000:]


def test_hopper_kernels_have_no_race_beyond_what_the_tool_reports_of_any_mbarrier(reports):
    """A record is rewritten once an mbarrier says that it was read. racecheck calls that a race in the smallest program too."""
    found = reports["racecheck", "native"]
    if problems(reports["racecheck", "record"]) == 0:  # a tool that follows mbarriers
        assert problems(found) == 0, found[-3000:]
    else:
        assert problems(reports["racecheck", "record read by one lane"]) > 0  # nor does it help that one lane reads and arrives
        assert set(re.findall(r"Potential (\w+) hazard", found)) <= {"WAR"}, found[-3000:]


def test_hopper_kernels_read_nothing_unwritten(reports):
    """Without a NaN no kernel reads an output again."""
    assert problems(reports["initcheck", "native finite"]) == 0, reports["initcheck", "native finite"][-3000:]
