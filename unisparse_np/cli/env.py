"""unisparse-np env: what this machine has, what is missing and how to get it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..attention import load_backend
from ..errors import BackendUnavailable
from ..parallel import world
from ..problem import Problem
from ..version import __version__

_LIBRARIES = ("numpy", "ml_dtypes", "safetensors", "tokenizers", "jinja2", "click", "threadpoolctl")
_OPTIONAL = {  # what it gives -> (distributions, any of which provides it; how to get it)
    "CuPy, the fast GPU backend": (("cupy-cuda12x", "cupy-cuda13x", "cupy"), 'pip install "unisparse-np[gpu]"'),
    "Numba CUDA, the readable GPU backend": (("numba-cuda",), 'pip install "unisparse-np[gpu]"'),
    "mpi4py, for several processes": (("mpi4py",), 'pip install "unisparse-np[mpi]"'),
    "NCCL, for several GPUs": (("nvidia-nccl-cu12", "nvidia-nccl-cu13"), 'pip install "unisparse-np[multi-gpu]"'),
    "gguf, which convert reads with": (("gguf",), 'pip install "unisparse-np[gguf]"'),
    "matplotlib, for pictures": (("matplotlib",), 'pip install "unisparse-np[plot]"'),
}
_GPU_FIELDS = {"name": "name", "memory": "memory.total", "driver": "driver_version", "compute_capability": "compute_cap"}


@click.command(short_help="Show versions, processor and GPU, and how to get what is missing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def env(as_json: bool) -> None:
    """Show versions, processor, memory and GPU, and how to get what is missing.

    Worth pasting into a bug report. Under mpirun it also lists the processes and their machines.
    """
    facts = collect() | {"ranks": world().gather_values({"host": platform.node(), "gpus": len(gpus())})}
    click.echo(json.dumps(facts) if as_json else as_text(facts))


def collect() -> dict[str, Any]:
    """Everything `env` prints, as plain values."""
    return {
        "unisparse_np": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "blas": blas(),
        "cpu": {"name": cpu_name(), "cores": usable_cores()},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": (found := gpus()),
        "gpu_kernels": gpu_kernels() if found else None,
        "optional": {
            purpose: {"version": next(filter(None, map(_version, names)), None), "install": install}
            for purpose, (names, install) in _OPTIONAL.items()
        },
    }


def as_text(facts: dict[str, Any]) -> str:
    """What `collect` found and the ranks, a line each."""
    rows = [
        ("unisparse-np", facts["unisparse_np"]),
        ("python", f"{facts['python']} on {facts['platform']}"),
        *((name, version or "missing: pip install unisparse-np") for name, version in facts["libraries"].items()),
        *(("BLAS", f"{blas['name']} {blas['version']}, {blas['threads']} threads") for blas in facts["blas"]),
        ("processor", f"{facts['cpu']['name']}, {facts['cpu']['cores']} cores"),
        ("memory", f"{facts['memory_bytes'] / 2**30:.1f} GiB"),
        *(
            ("GPU", f"{gpu['name']}, {gpu['memory']}, compute capability {gpu['compute_capability']}, driver {gpu['driver']}")
            for gpu in facts["gpus"]
        ),
    ]
    if facts["gpu_kernels"]:
        rows.append(("GPU kernels", facts["gpu_kernels"]["missing"] or as_ready(facts["gpu_kernels"])))
    if not facts["gpus"]:
        rows.append(("GPU", "none found (nvidia-smi lists none): the reference backend, NumPy, runs without one"))
    if len(facts["ranks"]) > 1:
        rows += [("rank", f"{rank} on {place['host']}, GPUs there: {place['gpus']}") for rank, place in enumerate(facts["ranks"])]
    lines = [f"{label:<14} {value}" for label, value in rows]
    lines += ["", "optional:"]
    lines += [
        f"  {purpose}: {part['version'] or 'missing, get it with: ' + part['install']}" for purpose, part in facts["optional"].items()
    ]
    return "\n".join(lines)


def gpu_kernels() -> dict[str, Any]:
    """A small call of the cupy backend: which kernel ran and how long making the kernels ready took, or what is missing."""
    problem = Problem(2, 1, q_len=256, k_len=256, head_dim=64)
    try:
        engine = load_backend("cupy")
        q, k = (engine.from_any("q", np.zeros((heads, 256, 64), np.float16)) for heads in (2, 1))
        kernel = engine.run_sparse(q, k, k, problem)[1].kernel
    except BackendUnavailable as error:
        return {"missing": str(error), "kernel": None, "ready_seconds": None}
    return {"missing": None, "kernel": kernel, "ready_seconds": engine.compile_seconds()}


def as_ready(kernels: dict[str, Any]) -> str:
    """The same in words."""
    return f"{kernels['kernel']} ran; made ready in {kernels['ready_seconds']:.2f} s (compiled once, then kept by CuPy)"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def blas() -> list[dict[str, Any]]:
    """The libraries that compute NumPy's matrix products, with their thread counts."""
    from threadpoolctl import threadpool_info

    return [
        {"name": pool["internal_api"], "version": pool["version"], "threads": pool["num_threads"]}
        for pool in threadpool_info()
        if pool["user_api"] == "blas"
    ]


def cpu_name() -> str:
    """The processor as Linux names it, otherwise as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on, which a container can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs as nvidia-smi lists them; none where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS.values())}", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    lines = found.stdout.splitlines() if found.returncode == 0 else []
    return [dict(zip(_GPU_FIELDS, (part.strip() for part in line.split(",")), strict=True)) for line in lines]
