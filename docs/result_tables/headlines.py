"""The first table of README.md's figures: a question a newcomer asks, and the answer of the results, in one line each."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from result_tables.figures import value
from result_tables.tables import GPU, Columns, Row, grid, machine_of, result_of, text
from unisparse_np import UniSparseConfig

COLUMNS: Columns = {"question": text("question"), "answer": text("answer"), "on": text("machine"), "more": text("more")}
RULES = "[rules](docs/selection_rules.md)"
KERNELS, MODELS, CPU = (
    f"[{name}](docs/measured.md#{section})"
    for name, section in (("kernels", "attention-and-selection-on-a-gpu"), ("models", "whole-models-on-a-gpu"), ("CPU", "on-a-cpu"))
)


def headlines() -> str:
    """The whole table."""
    return grid(COLUMNS, [needles(), words(), attention(), prompt(), step(), laptop(), agreement()]) + "\n"


def line(question: str, answer: str, result: dict[str, Any], more: str) -> Row:
    """A row of the table."""
    return {"question": question, "answer": answer, "machine": machine_of(result), "more": more}


def number(result: dict[str, Any], key: str, **wanted: Any) -> float:
    """A number of the one row that has these entries; a ValueError where none has it."""
    found = value(result, key, **wanted)
    if found is not None:
        return float(found)
    raise ValueError(f"no row with {wanted} was measured by {result['stamp']['command']}: run it whole, then `make docs` again")


def needles() -> Row:
    """Facts found by the balanced preset, of those that dense attention finds."""
    results = [result_of(f"selection_rules_needles_{length}") for length in (8192, 16384)]
    kept, density = (
        " / ".join(f"{number(result, key, config=asdict(UniSparseConfig.balanced())):.0%}" for result in results)
        for key in ("share_on_solved_tasks", "density")
    )
    answer = f"{kept} of what dense attention finds, with {density} of the attention computed (preset `balanced`)"
    return line("Are facts still found in 8K / 16K tokens?", answer, results[0], RULES)


def words() -> Row:
    """KL of the presets and of the paper's rule on a real model's text."""
    result = result_of("selection_rules_text_8192")
    configs = {"`balanced`": UniSparseConfig.balanced(), "default": UniSparseConfig(), "the paper's bare rule": UniSparseConfig.paper()}
    answer = "; ".join(
        f"{name} {number(result, 'kl', config=asdict(config)):.3f} with {number(result, 'density', config=asdict(config)):.0%} computed"
        for name, config in configs.items()
    )
    return line("Does a real model predict the same words? KL from dense in 8K tokens, SmolLM2", answer, result, RULES)


def attention() -> Row:
    """Dense and whole sparse calls beside cuDNN."""
    result = result_of(f"attention_gpu_{GPU}")
    cudnn, dense = (number(result, "ms", work="dense", length=131072, kernel=kernel) for kernel in ("cudnn", "ours"))
    calls = sorted((row["density"], row["ms"]) for row in result["rows"] if row["work"] == "whole call")
    parts = [f"{cudnn / ms:.2f} with {density:.0%} computed" for density, ms in reversed(calls)]
    answer = ", ".join([f"{cudnn / dense:.2f} times PyTorch's dense cuDNN attention", *parts])
    return line("How fast is attention over 128K tokens, choosing included?", answer, result, KERNELS)


def prompt() -> Row:
    """Seconds to read a long prompt with the 8B shape."""
    result = result_of(f"llama_gpu_{GPU}")
    case: dict[str, Any] = {"work": "prefill", "tokens": 131072}
    theirs = number(result, "seconds", kernel="transformers cudnn", **case)
    sparse, dense = (number(result, "seconds", kernel="ours", given_density=density, **case) for density in (0.25, None))
    answer = f"{sparse:.1f} s with 25% computed, {dense:.1f} s dense; transformers {theirs:.1f} s"
    return line("How long does an 8B model take to read 128K tokens?", answer, result, MODELS)


def step() -> Row:
    """Milliseconds of a token behind a prompt, the same shape."""
    result = result_of(f"llama_gpu_{GPU}")
    ours, theirs = (1e3 * number(result, "seconds", work="decode", tokens=8192, kernel=name) for name in ("ours dense", "transformers"))
    return line("And to write a token behind 8K?", f"{ours:.1f} ms; transformers {theirs:.0f} ms", result, MODELS)


def laptop() -> Row:
    """Seconds to read a prompt on a CPU."""
    result = result_of("smollm2_prefill")
    sparse, dense, theirs = (number(result, "seconds", engine=name, length=8192) for name in ("default", "dense", "transformers"))
    answer = f"{sparse:.0f} s with the default preset, {dense:.0f} s dense; transformers {theirs:.0f} s"
    return line("And without a GPU? SmolLM2 reads 8K tokens", answer, result, CPU)


def agreement() -> Row:
    """Random problems against the reference, and whole answers against transformers."""
    problems, judged = result_of(f"random_problems_{GPU}"), result_of("judge_smollm2")
    passed = problems["problems"] - len(problems["failures"])
    answer = f"{passed:,} of {problems['problems']:,} random problems agree with the float64 reference; in float32 on a CPU "
    answer += f"SmolLM2 writes what it writes in transformers on {judged['prompts_with_equal_tokens']} of {judged['prompts']} prompts"
    return line("Is it right?", answer, problems, "[tools](docs/kernels.md#tools)")
