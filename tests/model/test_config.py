"""config.json of every family, whole and broken."""

import pytest

from tests.llama_checkpoints import load_case
from unisparse_np import CheckpointError
from unisparse_np.model.config import ModelConfig

MINIMAL = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
SLIDING = {**MINIMAL, "model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 64}


def config(**changed: object) -> ModelConfig:
    return ModelConfig.from_dict({**MINIMAL, **changed})


def test_what_transformers_4_and_5_write_reads_alike():
    for name in ("llama", "llama_llama3", "llama_yarn", "mistral", "qwen2", "qwen3"):
        old, new = (ModelConfig.from_dict(load_case(f"{name}_transformers{version}").config) for version in (4, 5))
        assert old == new


def test_a_minimal_config_is_filled_in_as_transformers_would():
    filled = config()
    assert (filled.num_key_value_heads, filled.head_dim, filled.max_position_embeddings) == (4, 16, 2048)
    assert (filled.rms_norm_eps, filled.tie_word_embeddings, filled.attention_bias, filled.mlp_bias) == (1e-6, False, False, False)
    assert config(num_key_value_heads=None, head_dim=None) == filled
    assert config(model_type="mistral", num_attention_heads=8).sliding_window == 4096
    assert config(model_type="qwen3", num_attention_heads=32).head_dim == 128


def test_families_differ_in_biases_and_norms():
    qwen2, qwen3 = (ModelConfig.from_dict(load_case(f"{name}_transformers5").config) for name in ("qwen2", "qwen3"))
    assert (qwen2.attention_bias, qwen2.attention_output_bias, qwen2.query_key_norm) == (True, False, False)
    assert (qwen3.attention_bias, qwen3.attention_output_bias, qwen3.query_key_norm) == (False, False, True)
    both = config(attention_bias=True)
    assert (both.attention_bias, both.attention_output_bias) == (True, True)


@pytest.mark.parametrize(
    ("raw", "window"),
    [
        (SLIDING, None),  # max_window_layers defaults to 28, more than the two layers
        ({**SLIDING, "max_window_layers": 1}, 64),
        ({**SLIDING, "max_window_layers": 2}, None),
        ({**SLIDING, "layer_types": ["full_attention", "sliding_attention"]}, 64),
        ({**SLIDING, "layer_types": ["full_attention"] * 2, "max_window_layers": 0}, None),
        ({**SLIDING, "max_window_layers": 0, "use_sliding_window": False}, None),
        ({**SLIDING, "max_window_layers": 0, "sliding_window": None}, None),
        ({**SLIDING, "model_type": "mistral"}, 64),
        ({**SLIDING, "model_type": "mistral", "sliding_window": None}, None),
        ({**SLIDING, "model_type": "llama"}, None),
    ],
)
def test_sliding_windows_are_found(raw, window):
    assert ModelConfig.from_dict(raw).sliding_window == window


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported: use a model of one of llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "has a quantization_config"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4: give head_dim"),
        ({"head_dim": 15}, "head_dim 15 cannot be rotated in pairs"),
        ({"head_dim": 2}, "head_dim 2 cannot be rotated"),
        ({"max_position_embeddings": -5}, "max_position_embeddings is -5"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"attention_bias": 1}, "attention_bias is 1"),
    ],
)
def test_a_broken_field_gets_one_sentence(changed, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        config(**changed)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"layer_types": ["full_attention"]}, "must list one type for each of the 2 layers"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer type 'chunked_attention' is not supported"),
        ({"max_window_layers": 0, "sliding_window": -1}, "sliding_window is -1"),
        ({"max_window_layers": "none"}, "max_window_layers is 'none'"),
        ({"use_sliding_window": "no"}, "use_sliding_window is 'no'"),
    ],
)
def test_a_broken_window_gets_one_sentence(changed, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        ModelConfig.from_dict({**SLIDING, **changed})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "holds a JSON list, not an object"),
        (None, "is missing"),
    ],
)
def test_a_broken_file_gets_one_sentence(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        ModelConfig.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        ModelConfig.from_folder(tmp_path / "nowhere")
