"""Hundreds of random problems against the reference, several at a time: the script that runs thousands, with fewer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.gpu


def test_hundreds_of_random_problems(cupy, tmp_path):
    workers = max(1, min(14, (os.cpu_count() or 1) - 2))
    script = [sys.executable, str(ROOT / "benchmarks" / "random_problems_gpu.py"), "--count", "400", "--workers", str(workers)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*script, "--output", str(tmp_path / "found.json")], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert sum(found["problems"].values()) == 400
    assert found["failures"] == []
