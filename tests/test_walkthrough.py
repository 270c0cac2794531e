"""The notebook runs from top to bottom and prints what it says it prints; the stage pages' links lead somewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "walkthrough.ipynb", *sorted((ROOT / "docs" / "stages").glob("*.md"))]

# A program of its own, because the notebook switches Numba's simulator on before it imports Numba.
CHECK = """
import json, sys
sys.path.insert(0, "docs")
from make_walkthrough import NOTEBOOK, depends_on_the_machine, printed_text, run_cells
for cell, printed, pictures in run_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8"))):
    drawn = sum(output["output_type"] == "display_data" for output in cell["outputs"])
    if not depends_on_the_machine(cell):
        assert printed == printed_text(cell), f"cell {cell['id']} prints\\n{printed}\\nand is stored as\\n{printed_text(cell)}"
        assert len(pictures) == drawn, f"cell {cell['id']} draws {len(pictures)} pictures, {drawn} are stored"
"""


def test_the_notebook_runs_and_prints_what_is_stored():
    pytest.importorskip("numba")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, f"run python docs/make_walkthrough.py after a change\n{done.stderr[-3000:]}"


def test_the_notebook_draws_and_stores_nothing_of_one_machine():
    cells = [cell for cell in json.loads(PAGES[0].read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert sum(output["output_type"] == "display_data" for cell in cells for output in cell["outputs"]) == 4
    assert any("depends-on-the-machine" in cell["metadata"].get("tags", ()) and not cell["outputs"] for cell in cells)
    assert all(cell["execution_count"] is None for cell in cells)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
