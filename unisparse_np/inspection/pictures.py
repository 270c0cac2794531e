"""Pictures of masks and densities, drawn by matplotlib into PNG files."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from ..errors import BackendUnavailable
from .capture import Capture, LayerCapture
from .reasons import NAMES, Reason

# Okabe and Ito's colours, told apart by colour-blind readers too; a cell takes the first that applies.
COLOURS = {
    Reason.DIAGONAL: "#566473",
    Reason.SINK: "#E69F00",
    Reason.LOCAL: "#009E73",
    Reason.TOP_P: "#0072B2",
    Reason.ROW_THRESHOLD: "#CC79A7",
}
DROPPED, FUTURE = "#D3D9DF", "#FFFFFF"


def check_matplotlib() -> None:
    """Raises BackendUnavailable when pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise BackendUnavailable("pictures need matplotlib: install it with  pip install 'unisparse-np[plot]'") from None


def draw_pictures(captured: Capture, tokens: int) -> dict[str, bytes]:
    """File name -> PNG: density.png for all layers, and layer_NN.png with every head's kept blocks."""
    pictures = {"density.png": _density_picture(captured)}
    for number, layer in captured.layers.items():
        pictures[f"layer_{number:02}.png"] = _mask_picture(number, layer, tokens)
    return pictures


def _density_picture(captured: Capture) -> bytes:
    densities = np.array([layer.densities for layer in captured.layers.values()])  # [layers, heads]
    figure = _figure(width=max(4.5, 0.35 * densities.shape[1] + 2.2), height=max(2.6, 0.22 * len(densities) + 1.6))
    axes = figure.subplots()
    image = axes.imshow(densities, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    step = math.ceil(len(densities) / 16)
    axes.set_yticks(range(0, len(densities), step), [str(number) for number in list(captured.layers)[::step]])
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    axes.set_title(f"Share of blocks computed (mean {densities.mean():.3f})")
    figure.colorbar(image, ax=axes, label="density (1 is dense)")
    return _png(figure)


def _mask_picture(number: int, layer: LayerCapture, tokens: int) -> bytes:
    from matplotlib.patches import Patch

    heads = len(layer.reasons)
    columns = math.ceil(math.sqrt(heads))
    rows = math.ceil(heads / columns)
    figure = _figure(width=2.1 * columns + 0.6, height=2.2 * rows + 1.1)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for head, axes in enumerate(grid.flat):
        if head >= heads:
            axes.set_axis_off()
            continue
        axes.imshow(mask_image(layer.reasons[head]), extent=(0, tokens, tokens, 0), interpolation="nearest")
        axes.set_title(f"head {head}: {layer.densities[head]:.3f}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.locator_params(nbins=4)
        if head + columns >= heads:  # nothing below
            axes.set_xlabel("key token", fontsize=8)
            axes.tick_params(labelbottom=True)
        if head % columns == 0:
            axes.set_ylabel("query token", fontsize=8)
    used = int(np.bitwise_or.reduce(layer.reasons, axis=None))
    patches = [Patch(color=colour, label=NAMES[reason]) for reason, colour in COLOURS.items() if used & reason]
    patches.append(Patch(color=DROPPED, label="dropped"))
    figure.suptitle(f"Layer {number}: kept blocks and density of each head", fontsize=11)
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    return _png(figure)


def mask_image(reasons: np.ndarray) -> np.ndarray:
    """reasons [N, N] -> RGB [N, N, 3] from 0 to 1."""
    from matplotlib.colors import to_rgb

    image = np.empty((*reasons.shape, 3))
    image[:] = to_rgb(DROPPED)
    image[np.triu(np.ones(reasons.shape, dtype=bool), 1)] = to_rgb(FUTURE)
    for reason, colour in reversed(COLOURS.items()):
        image[reasons & reason != 0] = to_rgb(colour)
    return image


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
