"""config.json of published models, and what is refused."""

import pytest

from pasa_jax.models import DecoderConfig

# https://huggingface.co/Qwen/Qwen2-7B/blob/main/config.json
QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA = {k: v for k, v in QWEN2_7B.items() if "window" not in k} | {"model_type": "llama"}


def test_qwen2_7b():
    assert DecoderConfig.from_hf(QWEN2_7B) == DecoderConfig(
        vocabulary=152064,
        width=3584,
        hidden=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        max_length=131072,
        rope_base=1e6,
        epsilon=1e-6,
        qkv_bias=True,
        out_bias=False,
        tied=False,
    )


def test_biases_of_llama():
    without, with_bias = (
        DecoderConfig.from_hf(LLAMA | {"attention_bias": bias}) for bias in (False, True)
    )
    assert not without.qkv_bias
    assert not without.out_bias
    assert with_bias.qkv_bias
    assert with_bias.out_bias


def test_a_window_that_no_layer_uses():
    unused = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 28}
    assert DecoderConfig.from_hf(QWEN2_7B | unused) == DecoderConfig.from_hf(QWEN2_7B)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("base", "changed", "message"),
    [
        (
            LLAMA,
            {"model_type": "mistral"},
            "`model_type` must be one of 'qwen2', 'llama'; got 'mistral'.",
        ),
        (LLAMA, {"hidden_act": "gelu"}, "`hidden_act` must be 'silu'; got 'gelu'."),
        (LLAMA, {"mlp_bias": True}, "`mlp_bias` must be False; got True."),
        (LLAMA, {"partial_rotary_factor": 0.5}, "`partial_rotary_factor` must be 1.0; got 0.5."),
        (
            LLAMA,
            {"quantization_config": {"bits": 4}},
            "`quantization_config` must be None; got {'bits': 4}.",
        ),
        (
            LLAMA,
            {"hidden_size": None},
            "`hidden_size` must be an int from 1 to 2147483647; got None.",
        ),
        (
            LLAMA,
            {"rope_scaling": LLAMA3},
            "`rope_scaling` must be of type 'default': rotary positions as they are; "
            f"got {LLAMA3!r}.",
        ),
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "`rope_scaling` must be of type 'default': rotary positions as they are; "
            "got {'type': 'linear', 'factor': 2.0}.",
        ),
        (
            LLAMA,
            {"rope_parameters": LLAMA3},
            "`rope_parameters` must be of type 'default': rotary positions as they are; "
            f"got {LLAMA3!r}.",
        ),
        (
            QWEN2_7B,
            {"use_sliding_window": True, "max_window_layers": 20},
            "`sliding_window` must not be in use; got 131072. Set use_sliding_window to false for "
            "texts shorter than the window.",
        ),
        (
            QWEN2_7B,
            {"layer_types": ["full_attention", "sliding_attention"]},
            "`layer_types` must be 'full_attention' throughout; "
            "got ['full_attention', 'sliding_attention'].",
        ),
        (
            LLAMA,
            {"num_key_value_heads": 5},
            "`kv_heads` must divide the number of heads, 28; got 5.",
        ),
        (
            LLAMA,
            {"head_dim": 31},
            "`head_dim` must be even, for rotary positions turn pairs; got 31.",
        ),
    ],
)
def test_refused(base, changed, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole sentence is compared
        DecoderConfig.from_hf(base | changed)
    assert str(error.value) == message
