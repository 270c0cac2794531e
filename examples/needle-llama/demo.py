"""What `make demo` runs: ask needle-llama about a fact hidden in a long text, and check its answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))
NAME = "needle-8k"


def main() -> int:
    prompt_file = HERE / "prompts" / f"{NAME}.txt"
    expected = json.loads((HERE / "prompts" / "answers.json").read_text(encoding="utf-8"))[NAME]
    prompt = prompt_file.read_text(encoding="utf-8")
    text, question = prompt.rsplit("\n", 1)
    needle_at = text.find(expected["answers"][0]) / len(text)
    print(f"A text of {len(prompt):,} characters. The fact that is asked for stands {needle_at:.0%} of the way in. The text ends with:\n")
    print(f" {question}\n")

    flags = ["--model", str(HERE), "--prompt", str(prompt_file), "--raw", "--stop", "."]
    print(f"$ unisparse-np generate {' '.join(flags)}", flush=True)
    answer, code = run([sys.executable, "-m", "unisparse_np", "generate", *flags])
    if code:
        return code
    right = all(reference.lower() in answer.lower() for reference in expected["answers"])
    print(f"\nExpected: {', '.join(expected['answers'])}. The answer is {'right' if right else 'WRONG'}.")
    return 0 if right else 1


def run(command: list[str]) -> tuple[str, int]:
    """Run a command, show its output as it comes, and return the output and the exit code."""
    output = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while piece := process.stdout.read(1):
            print(piece, end="", flush=True)
            output += piece
    return output, process.returncode


if __name__ == "__main__":
    sys.exit(main())
