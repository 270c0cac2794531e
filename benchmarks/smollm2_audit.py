"""Where does sparse attention lose in a real model, and what mends it? The audit of SmolLM2, presets default and paper.

    make smollm2 && python benchmarks/smollm2_audit.py --length 4096

The text is English prose (the Python language reference); the command `unisparse-np audit` prints the same for any model.
"""

from __future__ import annotations

import argparse

from common import SMOLLM2, prose, stamp, write_result

from unisparse_np import UniSparseConfig
from unisparse_np.inspection.model_audit import audit_model
from unisparse_np.inspection.model_audit_text import audit_text
from unisparse_np.model.loading import load

PRESETS = {"default": UniSparseConfig(), "paper": UniSparseConfig.paper()}
FIRST_TOKEN = 20_000  # of the prose: past its table of operators


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--preset", choices=PRESETS, action="append", help="default: both")
    options = parser.parse_args()
    model, tokenizer = load(str(SMOLLM2), backend="reference")
    token_ids = tokenizer.encode(prose())[FIRST_TOKEN : FIRST_TOKEN + options.length]
    for name in options.preset or PRESETS:
        audit = audit_model(model, token_ids, PRESETS[name])
        print(f"== {name}\n{audit_text(audit)}\n", flush=True)
        result = {
            "stamp": stamp(),
            "model": "SmolLM2-135M-Instruct, from its Q4_1 GGUF",
            "text": f"the Python language reference (pydoc_data.topics), from token {FIRST_TOKEN}",
            "preset": name,
            **audit.as_dict(),
        }
        print(write_result(f"audit_smollm2_{name}", result))


if __name__ == "__main__":
    main()
