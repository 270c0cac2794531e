"""Run on every rank by test_models.py: all cases on all grids of this many ranks; rank 0 stores what came out."""

import sys
from pathlib import Path

import numpy as np

from tests.parallel.model_cases import CASES, grids, open_model, results
from unisparse_np.attention import load_backend
from unisparse_np.parallel import arrange, world

folder, everyone = Path(sys.argv[1]), world()
for name, case in CASES.items():
    for tensor, context in grids(name, everyone.size):
        found = results(open_model(folder, case.model, arrange(everyone, context, load_backend("reference"))), case)
        for key, value in found.items():
            for other in everyone.all_gather(value) if everyone.size > 1 else []:
                np.testing.assert_array_equal(other, value, err_msg=f"{name}, {tensor} x {context}: {key} differs between ranks")
        if everyone.rank == 0:
            np.savez(folder / f"{name} {tensor}x{context}.npz", **found)
