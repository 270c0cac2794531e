"""Do SmolLM2's greedy tokens equal those of transformers? Dense attention, float32, 22 prompts of 10 to 4,000 tokens.

    make smollm2 && pip install torch transformers && python benchmarks/judge_smollm2.py

Each prompt is prose (the Python language reference) or code (the standard library). This project continues it greedily;
transformers then reads prompt and continuation at once, and its own greedy choice at every position must be the token that
was chosen: if all are, its greedy continuation is the same. Where one is not, both models' two highest logits are kept.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from common import SMOLLM2, code, prose, stamp, write_result
from transformers import AutoModelForCausalLM

from unisparse_np import load

LENGTHS = (10, 14, 20, 28, 40, 56, 80, 110, 150, 200, 270, 360, 480, 640, 850, 1100, 1450, 1900, 2400, 3000, 3500, 4000)
NEW_TOKENS = 24
CHARACTERS_APART = 20_011  # between the places where prompts begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="leave out prompts of more tokens")
    longest = parser.parse_args().longest
    model, tokenizer = load(SMOLLM2, backend="reference", dtype="float32")
    judge = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32, attn_implementation="sdpa").eval()
    rows = []
    for number, length in enumerate(length for length in LENGTHS if length <= longest):
        kind, text = (("prose", prose()), ("code", code()))[number % 2]
        start = number * CHARACTERS_APART % (len(text) // 2)
        prompt = tokenizer.encode(text[start : start + 12 * length + 200])[:length]
        rows.append({"prompt_tokens": len(prompt), "text": kind, **compare(prompt, *continue_greedily(model, prompt), judge)})
        print(rows[-1], flush=True)
    result = {
        "stamp": stamp("torch", "transformers"),
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "new_tokens": NEW_TOKENS,
        "prompts": len(rows),
        "prompts_with_equal_tokens": sum(row["equal"] for row in rows),
        "tokens_compared": len(rows) * NEW_TOKENS,
        "largest_relative_logit_difference": max(row["relative_logit_difference"] for row in rows),
        "rows": rows,
    }
    print(write_result("judge_smollm2", result))


def continue_greedily(model: Any, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """Our next tokens, and the logits [new, vocab] that each was chosen from."""
    cache = model.new_cache(len(prompt) + NEW_TOKENS)
    logits = [model.prefill(prompt, cache, "dense")]
    chosen = [int(logits[0].argmax())]
    while len(chosen) < NEW_TOKENS:
        logits.append(model.step(chosen[-1], cache, "dense"))
        chosen.append(int(logits[-1].argmax()))
    return chosen, np.stack(logits)


def compare(prompt: list[int], chosen: list[int], ours: np.ndarray, judge: Any) -> dict[str, Any]:
    """What transformers would have chosen at each of those places."""
    with torch.no_grad():
        theirs = judge(torch.tensor([prompt + chosen[:-1]]), logits_to_keep=len(chosen)).logits[0].numpy()  # [new, vocab]
    different = np.flatnonzero(theirs.argmax(axis=1) != chosen)
    row: dict[str, Any] = {
        "equal": different.size == 0,
        "relative_logit_difference": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        "smallest_gap_of_the_two_highest_logits": float(np.min(np.diff(np.sort(theirs, axis=1)[:, -2:], axis=1))),
    }
    if different.size:
        first = int(different[0])
        row["first_difference"] = {"new_token": first, "ours": two_highest(ours[first]), "transformers": two_highest(theirs[first])}
    return row


def two_highest(logits: np.ndarray) -> list[dict[str, float]]:
    return [{"token_id": int(token), "logit": float(logits[token])} for token in np.argsort(logits)[:-3:-1]]


if __name__ == "__main__":
    main()
