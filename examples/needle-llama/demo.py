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
    command = [sys.executable, "-m", "unisparse_np", "generate", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # progress and statistics go to the terminal
    if done.returncode:
        return done.returncode
    right = all(reference.lower() in done.stdout.lower() for reference in expected["answers"])
    print(f"\nAnswer: {done.stdout.strip()}. Expected: {', '.join(expected['answers'])}. {'RIGHT' if right else 'WRONG'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
