"""Logits on 1, 2 and 4 ranks are those of one process: tensor-parallel, context-parallel, and both."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest

from .launch import needs_mpi, run_ranks
from .model_cases import CASES, GRIDS, grids, open_model, results, write_models

SCRIPT = Path(__file__).parent / "models_on_ranks.py"


@cache
def folder() -> Path:
    path = Path(mkdtemp())
    write_models(path)
    return path


@cache
def on_ranks(count: int) -> None:
    done = run_ranks(count, "-m", "mpi4py", str(SCRIPT), str(folder()))
    assert done.returncode == 0, done.stderr


@cache
def of_one_process(name: str) -> dict[str, np.ndarray]:
    return results(open_model(folder(), CASES[name].model), CASES[name])


@needs_mpi
@pytest.mark.parametrize(
    ("count", "name", "grid"),
    [(count, name, grid) for count in GRIDS for name in CASES for grid in grids(name, count)],
    ids=lambda value: f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value),
)
def test_logits_are_those_of_one_process(count, name, grid):
    on_ranks(count)
    expected = of_one_process(name)
    with np.load(folder() / f"{name} {grid[0]}x{grid[1]}.npz") as found:
        for key in expected.keys() - {"densities"}:
            np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=1e-10, err_msg=key)
        np.testing.assert_allclose(found["densities"], expected["densities"], rtol=1e-13)  # a block that flips moves them by 1e-4


def test_the_sparse_cases_are_sparse():
    for name, case in CASES.items():
        if case.attention != "dense" and case.tokens > 200:
            assert min(of_one_process(name)["densities"]) < 0.9, name
