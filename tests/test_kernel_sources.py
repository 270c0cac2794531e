"""Whoever opens a CUDA source finds what it is for, how it came to be and how it uses shared memory."""

import re

import pytest

from tests.emulator.cupy_on_cpu import SOURCES

FILES = sorted(SOURCES.glob("*.cu"))


def opening_of(path):
    """The comment at the top, without its slashes."""
    lines = path.read_text().splitlines()
    end = next(n for n, line in enumerate(lines) if not line.startswith("//"))
    return "\n".join(line.removeprefix("//") for line in lines[:end])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_opening_names_its_step_its_versions_and_its_shared_memory(path):
    opening = opening_of(path)
    first = opening.split("\n\n")[0]
    assert re.search(r"\b[Ss]teps? \d|No step of\s+ALGORITHM\.md", first), "which step is this?"
    ladder = re.search(r"^ Version ladder.*\n((?:  .*\n)+)", opening, re.MULTILINE)
    assert ladder, "no version ladder"
    versions = [int(number) for number in re.findall(r"^ {2,3}(\d+)  \S", ladder[1], re.MULTILINE)]
    assert versions == [*range(1, 1 + len(versions))] != []
    assert "Shared memory" in opening, "no map of shared memory"
