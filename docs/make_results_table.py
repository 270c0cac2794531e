"""Write what was measured, from benchmarks/results/*.json: the tables of README.md between its markers, and docs/measured.md."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from result_tables.attention_figures import ATTENTION_FIGURES
from result_tables.figures import figure_table
from result_tables.headlines import headlines
from result_tables.loss_figures import LOSS_FIGURES
from result_tables.loss_tables import LOSS_TABLES, PRESETS
from result_tables.model_figures import MODEL_FIGURES, SEVERAL, SEVERAL_GPUS_FIGURES
from result_tables.speed_tables import ATTENTION_TABLES, CPU_TABLES, MODEL_TABLES, SEVERAL_GPUS_TABLES
from result_tables.tables import Table, has_result, shown

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "measured.md"
START, END = "<!-- results: written by docs/make_results_table.py -->", "<!-- end of results -->"

OPENING = """# What was measured

Written by `docs/make_results_table.py` from the files that the benchmarks leave in `benchmarks/results`. The figures that were
asked for, and what each preset loses, are in the [README](../README.md#measured); forty rules more in
[selection_rules.md](selection_rules.md). How all of it is measured is told in [evaluation.md](evaluation.md) and
[kernels.md](kernels.md).

"""
RULES_NOTE = """[ ] are 95% intervals. Density is the share of attention that was computed; choosing what to compute comes on top:
*selection*, as a share of dense attention's products. Forty rules more are in [docs/selection_rules.md](docs/selection_rules.md).

"""
ASKED_NOTE = """### Asked and reached

*Asked* is what was set beforehand as good enough, *goal* as good; **no** marks what is not there yet. Speeds are ratios within one run.

"""
SECTIONS: dict[str, list[tuple[str, Table]]] = {
    "What sparse attention loses": LOSS_TABLES,
    "Attention and selection on a GPU": ATTENTION_TABLES,
    "Whole models on a GPU": MODEL_TABLES,
    "On several GPUs": SEVERAL_GPUS_TABLES,
    "On a CPU": CPU_TABLES,
}


def with_results(readme: str) -> str:
    """The README with what each rule loses, and with the figures that were asked for."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README.md lacks the line {START!r} or {END!r}")
    tables = [
        headlines(),
        shown(*PRESETS, root=""),
        RULES_NOTE,
        ASKED_NOTE,
        figure_table("What sparse attention loses", LOSS_FIGURES),
        figure_table("Attention on one GPU: q [32, L, 128], k, v [8, L, 128], bfloat16, causal, batch 1", ATTENTION_FIGURES),
        figure_table("A whole model on one GPU: bfloat16, batch 1", MODEL_FIGURES),
    ]
    if has_result(*SEVERAL):
        tables.append(figure_table("The 8B shape on several GPUs of one machine: 128K tokens, 25% density", SEVERAL_GPUS_FIGURES))
    return f"{before}{START}\n\n{''.join(tables)}{END}{after}"


def page() -> str:
    """docs/measured.md: a section for each thing that is measured, a table for each result that is there."""
    sections = {title: [shown(name, table, root="../") for name, table in tables if has_result(name)] for title, tables in SECTIONS.items()}
    return OPENING + "".join(f"## {title}\n\n" + "".join(tables) for title, tables in sections.items() if tables).rstrip() + "\n"


if __name__ == "__main__":
    README.write_text(with_results(README.read_text(encoding="utf-8")), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
