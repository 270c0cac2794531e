"""`pytest -m gpu`, shared out to processes that use one GPU together, with a log that says on what it ran.

    PYTHONPATH=. python benchmarks/gpu_tests.py [--limit 126] [--most 22] [--numba-path FOLDER] [--commit ID] [--output FILE]

The log goes to benchmarks/results/gpu_tests_<device>.log: card, versions and commit, then each piece's own words, then the sum.
Exit status 1 unless every test that was collected has passed or was skipped.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, stamp_of_backend

FOLDERS = ("tests/gpu", "tests/numba/test_gpu_arrays.py")
WHOLE = ("test_random_problems", "test_ranks", "test_sanitizer")  # these start processes of their own, or share what one test made
PYTEST = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=600, help="seconds that a piece may take")
    parser.add_argument("--most", type=int, default=22, help="tests of a piece")
    parser.add_argument("--numba-path", default="", help="folder of a NumPy that Numba takes, where the installed one is too new")
    parser.add_argument("--commit", default="", help="what is tested, where there is no git checkout")
    parser.add_argument("--output", default="", help="where the log goes; default: benchmarks/results")
    arguments = parser.parse_args()
    start = time.time()
    tests = [test for folder in FOLDERS for test in collect(folder, environment(folder, arguments.numba_path))]
    texts = run_all(pieces(tests, arguments.most), start + arguments.limit, arguments.numba_path)
    totals = sum((outcomes(text) for text in texts.values()), Counter[str]())
    missing = len(tests) - sum(totals[kind] for kind in ("passed", "failed", "skipped", "error"))
    total = f"{len(tests)} tests collected: {', '.join(f'{count} {kind}' for kind, count in totals.items())}; {missing} without a result"
    text = "\n".join([header(arguments.commit), *(f"== {name}\n{text}" for name, text in texts.items()), f"== {total}"])
    path = Path(arguments.output) if arguments.output else RESULTS / f"gpu_tests_{device_name().lower().replace(' ', '_')}.log"
    path.write_text(text + "\n")
    for name, words in texts.items():
        print(f"{name:24} {words.splitlines()[-1] if words else 'nothing'}")
        print("\n".join(line[:200] for line in words.splitlines() if re.match(r"E  |FAILED|ERROR", line)), end="")
    print(f"{total}, in {time.time() - start:.0f} s: {path}")
    return 1 if missing or totals["failed"] or totals["error"] else 0


def run_all(parts: dict[str, list[str]], end: float, numba_path: str) -> dict[str, str]:
    """{piece: what pytest printed}; all at the same time, until `end`."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = {name: Path(folder) / name for name in parts}
        running = {name: run(tests, environment(tests[0], numba_path), outputs[name]) for name, tests in parts.items()}
        return {name: words_of(process, outputs[name], end - time.time()) for name, process in running.items()}


def environment(test: str, numba_path: str) -> dict[str, str]:
    """Few threads a process; Numba's tests with the NumPy they need."""
    path = [numba_path] if numba_path and test.startswith("tests/numba") else []
    path += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    return os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(path)}


def collect(folder: str, env: dict[str, str]) -> list[str]:
    """The ids of the tests in a folder or file. Exits with pytest's words where it cannot collect them."""
    done = subprocess.run([*PYTEST, "--collect-only", folder], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]


def pieces(tests: list[str], most: int) -> dict[str, list[str]]:
    """{piece: ids}, in even parts of each file."""
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(Path(test.split("::")[0]).stem, []).append(test)
    found = {}
    for file, ids in files.items():
        parts = 1 if file in WHOLE else -(-len(ids) // most)
        for n in range(parts):
            found[f"{file.removeprefix('test_')}-{n}"] = ids[n * len(ids) // parts : (n + 1) * len(ids) // parts]
    return found


def run(tests: list[str], env: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    """pytest on some tests, started; what it prints goes to a file."""
    with output.open("wb") as file:
        return subprocess.Popen([*PYTEST, *tests], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def words_of(process: subprocess.Popen[bytes], output: Path, seconds: float) -> str:
    """What a piece printed, once it has ended or its time is over; then what it started ends with it."""
    note = ""
    try:
        process.wait(timeout=max(0.1, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        note = "\nstopped: out of time"
    return output.read_text(errors="replace").strip() + note


def outcomes(text: str) -> Counter[str]:
    """{passed, failed, skipped, error: count} of a piece's last line."""
    last = text.splitlines()[-1] if text else ""
    return Counter({kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)})


def header(commit: str) -> str:
    """One line: the card, its driver, versions and what was tested."""
    found = stamp_of_backend("cupy")
    libraries = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    gpus = "; ".join(", ".join(gpu.values()) for gpu in found["gpus"])
    tested = f"commit {commit or found['commit'] or 'unknown'}, {found['date']}"
    return f"pytest -m gpu on {gpus}; Python {found['python']}, {libraries}; {tested}"


def device_name() -> str:
    """As the driver calls it."""
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()


if __name__ == "__main__":
    sys.exit(main())
