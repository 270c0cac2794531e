"""What every benchmark shares: the machine's stamp, texts that come with Python, and results written whole."""

from __future__ import annotations

import datetime
import json
import os
import platform
import pydoc_data.topics
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

from unisparse_np.cli.env import collect

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SMOLLM2 = ROOT / "models" / "smollm2"
NEEDLE_LLAMA = ROOT / "examples" / "needle-llama"

CODE_FILES = ("argparse.py", "typing.py", "tarfile.py", "doctest.py", "inspect.py", "zipfile.py", "smtplib.py", "optparse.py")


def stamp(*more_libraries: str) -> dict[str, Any]:
    """Machine, versions, commit and date of a run."""
    facts = collect()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "cpu": facts["cpu"],
        "blas": facts["blas"],
        "memory_bytes": facts["memory_bytes"],
        "versions": {"unisparse_np": facts["unisparse_np"], "numpy": facts["libraries"]["numpy"]}
        | {name: metadata.version(name) for name in more_libraries},
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """benchmarks/results/NAME.json, replaced only once it is whole."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def prose() -> str:
    """The Python language reference, as `pydoc` shows it: about 700 KB of English technical prose."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def code() -> str:
    """Eight modules of Python's standard library, one after the other."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [library / name if (library / name).exists() else library / Path(name).stem / "__init__.py" for name in CODE_FILES]
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
