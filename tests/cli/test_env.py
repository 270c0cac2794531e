"""unisparse-np env: what is here, what is missing, and the command that gets it."""

import json

import pytest
from click.testing import CliRunner

from unisparse_np import __version__
from unisparse_np.cli import main
from unisparse_np.cli.env import collect


def test_json_holds_versions_machine_and_what_is_missing() -> None:
    result = CliRunner().invoke(main, ["env", "--json"])
    facts = json.loads(result.stdout)
    assert result.exit_code == 0 and facts["unisparse_np"] == __version__
    assert facts["libraries"]["numpy"].count(".") == 2
    assert facts["blas"] and all(pool["threads"] >= 1 for pool in facts["blas"])
    assert facts["memory_bytes"] > 2**28 and facts["cpu"]["cores"] >= 1
    assert all(part["install"].startswith("pip install") for part in facts["optional"].values())


def test_what_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisparse_np.cli.env._version", lambda name: None)
    monkeypatch.setattr("unisparse_np.cli.env.gpus", list)
    shown = CliRunner().invoke(main, ["env"]).stdout
    assert 'CuPy, the fast GPU backend: missing, get it with: pip install "unisparse-np[gpu]"' in shown
    assert "none found" in shown


def test_gpus_come_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB, 570.86, 9.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert collect()["gpus"] == [{"name": "NVIDIA H100 80GB HBM3", "memory": "81559 MiB", "driver": "570.86", "compute_capability": "9.0"}]
    shown = CliRunner().invoke(main, ["env"]).stdout
    assert "NVIDIA H100 80GB HBM3, 81559 MiB, compute capability 9.0" in shown
    assert "GPU kernels    the cupy backend needs cupy, which is not installed: pip install" in shown or "made ready in" in shown
