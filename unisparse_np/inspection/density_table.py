"""Density of every layer and head as a table for a terminal."""

from __future__ import annotations

from typing import Any

import numpy as np

from .capture import Capture


def density_table(captured: Capture) -> str:
    """One line a layer: its mean, then every head, in percent."""
    layers = {number: layer.densities for number, layer in captured.layers.items()}
    heads = len(next(iter(layers.values())))
    title = "density in percent of the blocks (100 is dense)" + (f", {captured.label}" if captured.label else "")
    lines = [title, f"{'layer':>5}{'mean':>7}  head" + "".join(f"{head:>4}" for head in range(heads))]
    for number, densities in layers.items():
        lines.append(f"{number:>5}{100 * densities.mean():>7.1f}      " + "".join(f"{100 * density:>4.0f}" for density in densities))
    means = [float(densities.mean()) for densities in layers.values()]
    lines.append(f"{'all':>5}{100 * np.mean(means):>7.1f}")
    return "\n".join(lines)


def densities_as_dict(captured: Capture) -> dict[str, Any]:
    """The same as plain values for JSON."""
    return {
        "label": captured.label,
        "density": float(np.mean([layer.densities.mean() for layer in captured.layers.values()])),
        "layers": {str(number): [float(density) for density in layer.densities] for number, layer in captured.layers.items()},
    }
