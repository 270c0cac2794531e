"""examples/needle-llama: its prompts come out of its scripts, and it answers them."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from unisparse_np import UniSparseConfig
from unisparse_np.model.generate import generate
from unisparse_np.model.loading import load

FOLDER = Path(__file__).parents[1] / "examples" / "needle-llama"
MAKE_PROMPTS = runpy.run_path(str(FOLDER / "make_prompts.py"))
ANSWERS = json.loads((FOLDER / "prompts" / "answers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MAKE_PROMPTS["PROMPTS"])
def test_the_prompts_are_what_their_recipe_makes(name: str) -> None:
    made = MAKE_PROMPTS["make"](*MAKE_PROMPTS["PROMPTS"][name])
    assert made.pop("prompt") == (FOLDER / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    assert made == ANSWERS[name]


@pytest.mark.parametrize("name", ["needle-2k", "question-4k", "four-needles-4k"])
def test_sparse_attention_answers_the_prompt(name: str) -> None:
    model, tokenizer = load(FOLDER, backend="reference")
    prompt = (FOLDER / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    answer = generate(model, tokenizer, prompt, attention=UniSparseConfig(), max_tokens=ANSWERS[name]["max_tokens"], raw=True)
    found = [reference in answer for reference in ANSWERS[name]["answers"]]
    assert all(found), f"{answer!r} lacks some of {ANSWERS[name]['answers']}"


def test_the_demo_answers_and_says_so() -> None:
    demo = subprocess.run([sys.executable, str(FOLDER / "demo.py")], capture_output=True, text=True, cwd=FOLDER.parents[1], check=False)
    assert demo.returncode == 0, demo.stderr
    assert "What is the special magic number" in demo.stdout and "5480941. RIGHT" in demo.stdout
    assert "density" in demo.stderr and "tokens/s" in demo.stderr
