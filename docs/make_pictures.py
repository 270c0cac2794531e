"""Draw the pictures of the README from a real run: needle-llama reading prompts/needle-8k.txt with the default config.

Needs matplotlib. Writes docs/pictures/block-mask.png.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from unisparse_np import Problem, UniSparseConfig
from unisparse_np.inspection.capture import capture
from unisparse_np.model.loading import load

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "needle-llama"
PROMPT, NEEDLE = MODEL / "prompts" / "needle-8k.txt", "5480941"
PICTURE = ROOT / "docs" / "pictures" / "block-mask.png"
LAYER, HEAD = 1, 7  # the head that fetches the needle, both from 0 as on the command line

FUTURE, DROPPED, BY_RIGHT, SELECTED = range(4)
COLOURS = ["#ffffff", "#dddddd", "#e69f00", "#0072b2"]  # Okabe and Ito's, told apart by all
LABELS = ["", "not kept (one anchor key each stays visible)", "kept by right: start, diagonal, neighbour", "kept for its attention"]


def read_the_prompt(config: UniSparseConfig) -> tuple[list[np.ndarray], int, int]:
    """Block masks [Hq, Nq, Nk], one a layer; the prompt's length; the needle's position, both in tokens."""
    model, tokenizer = load(MODEL, backend="reference")
    prompt = PROMPT.read_text(encoding="utf-8")
    token_ids = tokenizer.encode(prompt)
    captured = capture(model, token_ids, config, label="default", with_truth=False)
    return [layer.kept for layer in captured.layers.values()], len(token_ids), len(tokenizer.encode(prompt[: prompt.index(NEEDLE)]))


def classes(mask: np.ndarray, problem: Problem) -> np.ndarray:
    """mask [Nq, Nk] -> FUTURE, DROPPED, BY_RIGHT or SELECTED for each block [Nq, Nk]."""
    kinds = np.where(mask, SELECTED, DROPPED)
    for i in range(problem.num_q_blocks):
        sink_stop, local_start, local_stop = problem.forced_blocks(i)
        kinds[i, :sink_stop] = kinds[i, local_start:local_stop] = BY_RIGHT
        kinds[i, problem.visible_blocks(i) :] = FUTURE
    return kinds


def draw_mask(axes: Axes, kinds: np.ndarray, needle_block: int, block_size: int) -> None:
    axes.imshow(kinds, cmap=ListedColormap(COLOURS), vmin=0, vmax=len(COLOURS) - 1, interpolation="nearest")
    count = len(kinds)
    axes.set_xlabel(f"key block ({block_size} tokens each): what is read")
    axes.set_ylabel("query block: who reads")
    axes.set_title(f"One head (layer {LAYER}, head {HEAD})", loc="left")
    visible = kinds != FUTURE
    share = (kinds[visible] != DROPPED).mean()
    axes.text(0.98, 0.97, f"{share:.1%} of the visible\nblocks are computed", transform=axes.transAxes, ha="right", va="top", fontsize=11)
    arrow, box = {"arrowstyle": "->", "color": "black"}, {"boxstyle": "round", "facecolor": "white", "edgecolor": "black"}
    text = "the question at the end\nfinds the needle's block"
    axes.annotate(text, xy=(needle_block, count - 1), xytext=(4, count * 0.72), arrowprops=arrow, bbox=box, fontsize=10)
    handles = [Patch(facecolor=COLOURS[kind], label=LABELS[kind]) for kind in (SELECTED, BY_RIGHT, DROPPED)]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.12), frameon=False, fontsize=10)


def draw_densities(axes: Axes, densities: np.ndarray) -> None:
    """densities [layers, heads] as numbers on a grey scale."""
    axes.imshow(densities, cmap="Blues", vmin=0, vmax=1)
    for (layer, head), density in np.ndenumerate(densities):
        axes.text(head, layer, f"{density:.0%}", ha="center", va="center", color="white" if density > 0.5 else "black", fontsize=10)
    axes.set_xticks(range(densities.shape[1]))
    axes.set_yticks(range(densities.shape[0]))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title("Share of the visible blocks that each head computes", loc="left")


def main() -> None:
    matplotlib.use("Agg")
    config = UniSparseConfig()
    masks, tokens, needle_at = read_the_prompt(config)
    problem = Problem(num_q_heads=8, num_kv_heads=2, q_len=tokens, k_len=tokens, head_dim=64, config=config)
    visible = sum(problem.visible_blocks(i) for i in range(problem.num_q_blocks))
    figure = Figure(figsize=(13, 6.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    draw_mask(left, classes(masks[LAYER][HEAD], problem), needle_at // config.block_size, config.block_size)
    draw_densities(right, np.array([mask.sum(axis=(1, 2)) / visible for mask in masks]))
    figure.suptitle(f"needle-llama reads {tokens:,} tokens with UniSparseConfig()", fontsize=14)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
