"""What every benchmark writes: one question, its rows, and the machine they were measured on."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from unisparse_np.cli.env import collect

RESULTS = Path(__file__).parent / "results"


def save(name: str, question: str, rows: list[dict[str, Any]], note: str = "", **versions: str) -> Path:
    """Write results/NAME.json.

    Args:
        question: what was measured, as one question.
        rows: one flat dictionary a row: column heading -> number or text. All have the same keys.
        note: how it was measured and what to make of it, in a sentence or two.
        versions: what else took part, such as torch="2.13".
    """
    if not rows or any(list(row) != list(rows[0]) for row in rows):
        raise ValueError("rows must be dictionaries with the same keys in the same order")
    facts = collect()
    path = RESULTS / f"{name}.json"
    result = {
        "question": question,
        "note": note,
        "date": datetime.date.today().isoformat(),
        "machine": {"processor": facts["cpu"], "memory_bytes": facts["memory_bytes"], "gpus": facts["gpus"], "platform": facts["platform"]},
        "versions": {"unisparse_np": facts["unisparse_np"], "python": facts["python"], **facts["libraries"], **versions},
        "blas": facts["blas"],
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
