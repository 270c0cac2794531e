"""Up to a thousand random problems against the reference, several at a time: the script that runs more, for a minute at most."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.gpu


def test_random_problems_for_a_minute(cupy, tmp_path):
    workers = max(1, min(6, (os.cpu_count() or 1) - 2))  # other tests may be running beside this one
    script = [sys.executable, str(ROOT / "benchmarks" / "random_problems_gpu.py"), "--count", "1000", "--seconds", "60", "--shapes", "5"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script += ["--workers", str(workers)]
    done = subprocess.run([*script, "--output", str(tmp_path / "found.json")], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["problems"] >= 10  # of what a busy machine got done
    assert found["failures"] == []
