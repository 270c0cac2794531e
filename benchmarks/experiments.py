"""Small experiments on what block selection keeps and loses, one command each.

    make smollm2
    python benchmarks/experiments.py composite-size               # c in {4, 8, 16, 32}: loss against selection time
    python benchmarks/experiments.py block-size                   # S in {64, 128, 256}
    python benchmarks/experiments.py top-p                        # P from .80 to .99
    python benchmarks/experiments.py head-compress                # composite heads
    python benchmarks/experiments.py unequal-composites           # c_q and c_k at equal cost
    python benchmarks/experiments.py diffuse-attention            # synthetic attention that flattens
    python benchmarks/experiments.py verbatim-copy                # token-level precision: quoting a passage far back
    python benchmarks/experiments.py needle-depth                 # where in the prompt a fact may stand
    python benchmarks/experiments.py rotary-bands                 # what pooling keeps of fast and slow rotary frequencies
    python benchmarks/experiments.py rank-correlation             # Spearman of compressed and true block masses, per layer

Each writes benchmarks/results/experiment_NAME.json and draws docs/pictures/experiment-NAME.png (needs matplotlib). On SmolLM2
and on needle-llama, whichever can answer; --backend cupy runs them on a GPU.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import experiment_attention
import experiment_needles
import experiment_sweeps
from common import RESULTS, ROOT, plain, stamp_of_backend, write_result
from experiment_plots import Experiment, draw

EXPERIMENTS = {
    **experiment_sweeps.EXPERIMENTS,
    **experiment_attention.EXPERIMENTS,
    **experiment_needles.EXPERIMENTS,
}
PICTURES = ROOT / "docs" / "pictures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=EXPERIMENTS, metavar="NAME")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a window and of a question; a multiple of 1,024")
    parser.add_argument("--windows", type=int, default=1, help="of each kind of text")
    parser.add_argument("--questions", type=int, default=28, help="of needle-llama's tasks")
    parser.add_argument("--backend", default="reference", choices=("reference", "cupy"))
    parser.add_argument("--workers", type=int, default=1, help="windows and questions measured at once, each in a process of its own")
    parser.add_argument("--plot-only", action="store_true", help="draw what was measured before")
    parser.add_argument("--no-plot", action="store_true")
    options = parser.parse_args()
    if options.length % 1024:
        parser.error(f"--length {options.length} is no multiple of 1,024, so the halves of a window would not be whole blocks")
    for name in options.names:
        experiment = EXPERIMENTS[name]
        file_name = f"experiment_{name.replace('-', '_')}"
        if not options.plot_only:
            print(write_result(file_name, measured(experiment, options)))
        if not options.no_plot:
            result = json.loads((RESULTS / f"{file_name}.json").read_text(encoding="utf-8"))
            print(draw(experiment.panels(result["rows"]), PICTURES / f"experiment-{name}.png"))


def measured(experiment: Experiment, options: argparse.Namespace) -> dict[str, Any]:
    """The rows, with where they come from."""
    rows = experiment.measure(options)
    for row in rows:
        print(*(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True)
    where = {"stamp": stamp_of_backend(options.backend), "length": options.length, "backend": options.backend}
    return where | {"configs": plain(experiment.configs), "rows": rows}


if __name__ == "__main__":
    main()
