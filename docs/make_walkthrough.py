"""Run docs/walkthrough.ipynb and store what its cells print and draw, without Jupyter.

    python docs/make_walkthrough.py

Cells run one after the other as a plain Python program. Cells tagged depends-on-the-machine keep no output.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

NOTEBOOK = Path(__file__).with_name("walkthrough.ipynb")


def run_cells(notebook: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, list[bytes]]]:
    """Each code cell with what it printed and the PNG pictures it drew. An exception in a cell comes through."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {cell['id']}", "exec"), names)
        pictures = []
        for number in plt.get_fignums():
            png = io.BytesIO()
            plt.figure(number).savefig(png, format="png", dpi=80, metadata={"Software": None})
            pictures.append(png.getvalue())
        plt.close("all")
        yield cell, printed.getvalue(), pictures


def depends_on_the_machine(cell: dict[str, Any]) -> bool:
    return "depends-on-the-machine" in cell["metadata"].get("tags", ())


def printed_text(cell: dict[str, Any]) -> str:
    """What a stored cell printed."""
    return "".join(line for output in cell["outputs"] if output["output_type"] == "stream" for line in output["text"])


def main() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell, printed, pictures in run_cells(notebook):
        cell["outputs"] = []
        if depends_on_the_machine(cell):
            continue
        if printed:
            cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
        for png in pictures:
            data = {"image/png": base64.b64encode(png).decode(), "text/plain": ["a figure"]}
            cell["outputs"].append({"output_type": "display_data", "metadata": {}, "data": data})
    temporary = NOTEBOOK.with_suffix(".partial")
    temporary.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, NOTEBOOK)


if __name__ == "__main__":
    sys.path.insert(0, str(NOTEBOOK.parents[1]))
    main()
