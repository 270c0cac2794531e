"""The plain 16-bit run that GPU tests measure against: it runs every family, and is off by what 16 bits keep."""

import ml_dtypes
import numpy as np
import pytest

from tests.emulator.models import open_model
from tests.llama_checkpoints import CASES, load_case, write_checkpoint
from tests.rounded_model import rounded_backend
from unisparse_np.attention import load_backend


@pytest.mark.parametrize(("held", "digit"), [(np.dtype(np.float16), 2.0**-11), (np.dtype(ml_dtypes.bfloat16), 2.0**-8)], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("transformers5")])
def test_a_plain_16_bit_run_is_off_by_its_last_digits(name, held, digit, tmp_path):
    case = load_case(name)
    write_checkpoint(tmp_path, case.config, case.tensors, case.dtype, case.shards)
    backends = load_backend("reference"), rounded_backend(held)
    logits = [open_model(tmp_path, backend, 512, held.name).logits(case.token_ids.tolist()) for backend in backends]
    error = float(np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max())
    assert digit / 4 < error < 16 * digit, error / digit
