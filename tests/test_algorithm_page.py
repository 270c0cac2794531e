"""The worked example of ALGORITHM.md, computed by the reference."""

from pathlib import Path

import numpy as np

from unisparse_np import Problem, UniSparseConfig
from unisparse_np.reference import compress, score_blocks, select_blocks

PAGE = (Path(__file__).parents[1] / "ALGORITHM.md").read_text(encoding="utf-8")
CONFIG = UniSparseConfig(4, 2, 2, top_p=0.9, row_threshold=0.999, key_anchors=0, sink_blocks=0, local_blocks=0)
PROBLEM = Problem(num_q_heads=1, num_kv_heads=1, q_len=8, k_len=8, head_dim=1, config=CONFIG, scale=1.0)
Q = np.array([1, 1, 1, 1, 1, 1, 2, 2], dtype=np.float64)[None, :, None]
K = np.array([0, 0, 4, 2, 0, 0, 1, 1], dtype=np.float64)[None, :, None]


def test_the_worked_example() -> None:
    qc, kc = compress(Q, K, PROBLEM)
    assert qc[0, :, 0].tolist() == [1, 1, 1, 2] and kc[0, :, 0].tolist() == [0, 3, 0, 1]
    assert "kc = [0, 3 | 0, 1]" in PAGE and "qc = [1, 1 | 1, 2]" in PAGE
    mean, peak = score_blocks(qc, kc, PROBLEM)
    for name, value in (("B[1, 0]", mean[0, 1, 0]), ("B[1, 1]", mean[0, 1, 1]), ("R[1, 0]", peak[0, 1, 0]), ("R[1, 1]", peak[0, 1, 1])):
        stated = [line for line in PAGE.splitlines() if line.lstrip().startswith(("step 3", "B[", "R[")) and name in line]
        assert any(f"{value:.3f}".lstrip("0") in line for line in stated), f"{name} = {value:.4f} is not on the page"
    assert select_blocks(mean, peak, PROBLEM)[0].tolist() == [[True, False], [True, True]]


def test_the_variation_of_the_example() -> None:
    flat = K.copy()
    flat[0, 2:4] = 0
    mean, _ = score_blocks(*compress(Q, flat, PROBLEM), PROBLEM)
    assert f"B[1] would be [{mean[0, 1, 0]:.3f}, {mean[0, 1, 1]:.3f}]".replace("0.", ".") in PAGE


def test_the_page_numbers_its_steps_as_the_code_cites_them() -> None:
    assert [f"### Step {n}. " in PAGE for n in range(1, 7)] == [True] * 6 and "### Step 7" not in PAGE
