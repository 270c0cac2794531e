"""What eval and tune measure on the CuPy backend, run on the CPU by the emulator, against the reference."""

import shutil
import sys

import numpy as np
import pytest

from tests.emulator import cupy_on_cpu
from tests.llama_checkpoints import load_case, write_checkpoint
from unisparse_np import UniSparseConfig
from unisparse_np.attention import load_backend
from unisparse_np.evaluation.divergence import divergence
from unisparse_np.evaluation.head_curves import measure_head_curves
from unisparse_np.evaluation.probe import Prober
from unisparse_np.evaluation.results import ResultsFile
from unisparse_np.evaluation.text_suite import logits_of_piece
from unisparse_np.model.config import ModelConfig
from unisparse_np.model.llama import Llama
from unisparse_np.model.weights import load_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")

CASE = load_case("qwen3_bias_head_dim_transformers5")
TOKENS = CASE.token_ids.tolist()[:40]


def config_of(factor: float) -> UniSparseConfig:
    top_p = 1 - min(0.9, 0.2 * factor)
    return UniSparseConfig(block_size=8, q_compress=4, k_compress=4, top_p=top_p, key_anchors=0, sink_blocks=0, local_blocks=0)


@pytest.fixture
def models(tmp_path):
    """The same float32 model on the reference and on the emulated backend."""
    folder = write_checkpoint(tmp_path, CASE.config, CASE.tensors)
    config = ModelConfig.from_folder(folder)
    with cupy_on_cpu.installed("80") as emulated:
        yield [
            Llama(config, load_weights(folder, config, backend.layers, "float32"), backend, len(CASE.token_ids))
            for backend in (load_backend("reference"), emulated)
        ]


def test_predictions_are_compared_where_they_are(models):
    found = []
    for model in models:
        pieces = [logits_of_piece(model, TOKENS[:-1], attention, model.new_cache(40, attention)) for attention in ("dense", config_of(4))]
        found.append(np.array(divergence(*pieces, np.array(TOKENS[1:]), model.backend.layers)))  # [4, T]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-5)
    assert found[0][0].max() > 1e-4


def test_probes_and_head_curves_are_those_of_the_reference(models, tmp_path):
    probes = [Prober(model, [TOKENS], ResultsFile(tmp_path / f"{n}.jsonl", {}))(config_of(4), [0]) for n, model in enumerate(models)]
    assert probes[1].kl == pytest.approx(probes[0].kl, rel=1e-2) and probes[1].densities == pytest.approx(probes[0].densities)
    curves = [measure_head_curves(model, [TOKENS], config_of) for model in models]
    np.testing.assert_allclose(curves[1].densities, curves[0].densities)
    np.testing.assert_allclose(curves[1].errors, curves[0].errors, rtol=1e-3, atol=1e-9)
    assert curves[0].errors.max() > 1e-6
