"""docs/multi_gpu.md holds the tables that the measured results make, and the model behaves as its formulas say."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
MODEL = runpy.run_path(str(DOCS / "make_scaling_model.py"))
ONE = MODEL["OneGpu"](fixed=0.006, per_density=0.214, dense=0.223, product_flop_a_second=790e12)
EIGHT_B, SEVENTY_B = MODEL["SHAPES"]


def test_the_page_is_current() -> None:
    page = (DOCS / "multi_gpu.md").read_text(encoding="utf-8")
    assert page == MODEL["page_with"](MODEL["tables"](), page), "run `make docs` and commit docs/multi_gpu.md"


def test_exchanged_bytes_are_those_of_the_shapes() -> None:
    assert MODEL["tensor_bytes"](EIGHT_B, 131072) == pytest.approx(2 * 131072 * 4096 * 2)
    assert MODEL["context_bytes"](EIGHT_B, 131072) == pytest.approx(2 * 8 * 131072 * 128 * 2)
    assert MODEL["tensor_bytes"](SEVENTY_B, 1000) / MODEL["context_bytes"](SEVENTY_B, 1000) == 8  # gathered once, summed twice


def test_one_rank_exchanges_nothing_and_more_ranks_compute_less() -> None:
    grid, seconds, context = MODEL["Grid"], MODEL["compute_seconds"], MODEL["exchange_seconds"]
    assert context(EIGHT_B, 131072, grid(1, 1)) == 0
    alone = seconds(ONE, EIGHT_B, 131072, 0.25, grid(1, 1))
    assert seconds(ONE, EIGHT_B, 131072, 0.25, grid(1, 4)) == pytest.approx(alone / 4)
    assert alone / 4 < seconds(ONE, EIGHT_B, 131072, 0.25, grid(4, 1)) < alone / 3  # norms are computed by every rank


def test_a_grid_needs_room_for_weights_and_cache() -> None:
    best = MODEL["best"]
    assert best(ONE, SEVENTY_B, 131072, 0.25, 2) is None  # 141 GB of weights on two cards of 80
    grid, *_ = best(ONE, SEVENTY_B, 131072, 0.25, 4)
    assert (grid.tensor, grid.context) == (4, 1)
    assert best(ONE, EIGHT_B, 131072, None, 8)[0].context == 8
