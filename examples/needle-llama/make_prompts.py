"""Write the prompts in prompts/ and the right answers beside them. The same text comes out every time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PROMPTS = {  # file name -> task, length in tokens (its answer included), seed
    "needle-2k": ("niah_single_2", 2048, 1),
    "question-4k": ("qa_1", 4096, 2),
    "four-needles-4k": ("niah_multiquery", 4096, 1),
    "needle-8k": ("niah_multikey_1", 8160, 3),
}


def make(task: str, length: int, seed: int) -> dict:
    """One prompt of tasks.py, as {prompt, answers, match, max_tokens}."""
    command = [sys.executable, str(HERE / "tasks.py"), task, str(length), "1", "--seed", str(seed)]
    made: dict = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return made


def main() -> None:
    answers = {}
    for name, recipe in PROMPTS.items():
        made = make(*recipe)
        (HERE / "prompts" / f"{name}.txt").write_text(made.pop("prompt"), encoding="utf-8")
        answers[name] = made
    (HERE / "prompts" / "answers.json").write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
