"""The wheel: built from the checkout, installed into an empty environment, run outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "unisparse_np"
NEEDLE_LLAMA = ROOT / "examples" / "needle-llama"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing an earlier build left in the checkout can slip in."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in files_of("pyproject.toml", "README.md", "LICENSE", "unisparse_np"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty virtual environment outside the checkout, with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", wheel)
    return folder


def files_of(*paths: str) -> list[str]:
    """The files of the checkout under these paths, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *paths]
    names = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).exists()]


def run(*command: object, cwd: Path | None = None) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHONPATH")}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=clean, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_carries_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
        licence = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert carried == set(files_of("unisparse_np"))
    assert licence


def test_the_command_answers_outside_the_checkout(environment: Path, tmp_path: Path) -> None:
    prompt = NEEDLE_LLAMA / "prompts" / "needle-2k.txt"
    answer = run(environment / "bin" / "unisparse-np", "generate", "-m", NEEDLE_LLAMA, "-p", prompt, "--raw", "--stop", ".", cwd=tmp_path)
    assert answer.strip() == "5861728"
    assert "unisparse-np" in run(environment / "bin" / "unisparse-np", "env", cwd=tmp_path)


def test_every_module_imports_without_the_extras(environment: Path, tmp_path: Path) -> None:
    """What needs an extra says so when it is used, not when it is imported; GPU backends are loaded on demand only."""
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
        if "gpu" not in path.parts and path.name != "__main__.py"
    )
    run(environment / "bin" / "python", "-c", "; ".join(f"import {module}" for module in modules), cwd=tmp_path)
