"""The plain 16-bit run that GPU tests measure against: it runs every family, and is off by what 16 bits keep."""

import ml_dtypes
import numpy as np
import pytest

from tests.llama_checkpoints import CASES, load_case, write_checkpoint
from tests.rounded_model import rounded_backend
from unisparse_np.attention import load_backend
from unisparse_np.model.config import ModelConfig
from unisparse_np.model.llama import Llama
from unisparse_np.model.weights import load_weights


@pytest.mark.parametrize(("held", "digit"), [(np.dtype(np.float16), 2.0**-11), (np.dtype(ml_dtypes.bfloat16), 2.0**-8)], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("transformers5")])
def test_a_plain_16_bit_run_is_off_by_its_last_digits(name, held, digit, tmp_path):
    case = load_case(name)
    write_checkpoint(tmp_path, case.config, case.tensors, case.dtype, case.shards)
    config = ModelConfig.from_folder(tmp_path)
    logits = [
        Llama(config, load_weights(tmp_path, config, backend.layers, held.name), backend, 512).logits(case.token_ids.tolist())
        for backend in (load_backend("reference"), rounded_backend(held))
    ]
    error = float(np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max())
    assert digit / 4 < error < 16 * digit, error / digit
