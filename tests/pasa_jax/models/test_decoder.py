"""Qwen2 and Llama against Hugging Face's in torch, on the same random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pasa_jax
from pasa_jax.models import Decoder, DecoderConfig, decoder
from tests.pasa_jax.models.answers import DECODERS, TOKENS, recorded, write_decoder
from tests.pasa_jax.models.directories import in_shards
from tests.thin import some

SMALL = DecoderConfig(
    vocabulary=50, width=32, hidden=48, layers=2, heads=4, kv_heads=2, head_dim=8, max_length=32
)
forward = jax.jit(Decoder.__call__, static_argnames="attention")


class TestAgainstTorch:
    @pytest.mark.parametrize("case", some(DECODERS))
    def test_logits(self, case, tmp_path):
        true = recorded(f"logits: {case}")
        ours = decoder.load(write_decoder(tmp_path, case))
        assert (ours.head is None) == ("tied" in case)
        np.testing.assert_allclose(forward(ours, TOKENS), true, atol=1e-4)
        # Comparing would mean little if the logits hardly varied.
        assert true.std() > 1

    def test_shards(self, tmp_path):
        in_shards(write_decoder(tmp_path, "qwen2"))
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        ours = forward(decoder.load(tmp_path), TOKENS)
        np.testing.assert_allclose(ours, recorded("logits: qwen2"), atol=1e-4)

    @pytest.mark.full
    def test_as_torch_saves_it(self, tmp_path):
        transformers = pytest.importorskip(
            "transformers", reason='pip install "pasa-jax[test-full]"'
        )
        write_decoder(tmp_path, "qwen2")
        theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype="float32")
        theirs.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
        assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
        ours = forward(decoder.load(tmp_path / "saved"), TOKENS)
        np.testing.assert_allclose(ours, recorded("logits: qwen2"), atol=1e-4)

    def test_rope_as_older_versions_write_it(self, tmp_path):
        name = "llama, another theta"
        path = write_decoder(tmp_path, name) / "config.json"
        config = json.loads(path.read_text())
        assert config.pop("rope_parameters")["rope_theta"] == 500
        path.write_text(json.dumps(config | {"rope_theta": 500.0, "rope_scaling": None}))
        ours = forward(decoder.load(tmp_path), TOKENS)
        np.testing.assert_allclose(ours, recorded(f"logits: {name}"), atol=1e-4)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_16_bits_are_as_good_as_torchs(self, dtype, tmp_path):
        true, theirs = recorded("logits: qwen2"), recorded(f"logits: qwen2, {dtype}")
        ours = decoder.load(write_decoder(tmp_path, "qwen2"), dtype)
        assert {x.dtype for x in jax.tree.leaves(nnx.state(ours))} == {jnp.dtype(dtype)}
        error, base = (np.abs(x - true).mean() for x in (np.asarray(forward(ours, TOKENS)), theirs))
        assert 0 < error <= 1.2 * base

    def test_biased_keys_break_eager_float16_and_not_ours(self, tmp_path):
        true = recorded("logits: qwen2, biased")
        assert np.isfinite(true).all()
        assert np.isnan(recorded("logits: qwen2, biased, float16")).all()
        model = decoder.load(write_decoder(tmp_path, "qwen2, biased"), "float16")
        ours = np.asarray(forward(model, TOKENS))
        wide = np.asarray(forward(model, TOKENS, attention=float32_scores))
        error, base = (np.abs(x - true).mean() for x in (ours, wide))
        assert error <= 1.2 * base
        assert base < 0.05 * true.std()


def float32_scores(q, k, v, layer):
    return pasa_jax.dot_product_attention(
        q, k, v, is_causal=True, shift="none", precision="float32"
    )


@pytest.fixture(scope="module")
def model():
    return Decoder(SMALL, rngs=nnx.Rngs(0))


class TestDecoder:
    def test_parameters_are_stacked_and_differ_from_layer_to_layer(self, model):
        kernel = model.blocks.attention.query.kernel[...]
        assert kernel.shape == (2, 32, 32)
        assert np.abs(kernel[0] - kernel[1]).mean() > 0.1

    def test_one_block_is_compiled_for_all_layers(self):
        def size(layers):
            config = DecoderConfig(**{**vars(SMALL), "layers": layers})
            model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
            ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
            return len(str(jax.make_jaxpr(lambda m, x: m(x))(model, ids)).splitlines())

        assert size(2) == size(7)

    def test_another_type_by_a_cast(self, model):
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
        assert (model.dtype, half.dtype) == (jnp.float32, jnp.bfloat16)

    def test_jit_of_jax_and_of_nnx(self, model):
        tokens = TOKENS[:, :8] % 50
        expected = model(tokens)  # op by op, but for the scan
        for jit in (jax.jit, nnx.jit):
            found = jit(Decoder.__call__)(model, tokens)
            np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_it_is_causal(self, model):
        tokens = TOKENS[:, :8] % 50
        later = tokens.copy()
        later[:, 5:] = (later[:, 5:] + 1) % 50
        one, other = forward(model, tokens), forward(model, later)
        np.testing.assert_allclose(one[:, :5], other[:, :5], atol=1e-6)
        assert np.abs(one[:, 5:] - other[:, 5:]).max() > 0.1

    def test_another_attention_is_told_of_its_layer(self, model):
        def only_in_the_first(q, k, v, layer):
            out = pasa_jax.dot_product_attention(q, k, v, is_causal=True)
            return jnp.where(layer == 0, out, jnp.zeros_like(out))

        tokens = TOKENS[:, :8] % 50
        deaf = Decoder(SMALL, rngs=nnx.Rngs(0))
        kernel = deaf.blocks.attention.out.kernel
        kernel[...] = kernel[...].at[1].set(0)
        expected = forward(deaf, tokens)
        np.testing.assert_allclose(model(tokens, attention=only_in_the_first), expected, atol=1e-5)
        assert np.abs(expected - forward(model, tokens)).max() > 0.01

    def test_the_default_is_called_by_its_public_name(self, model, monkeypatch):
        seen = []
        true = pasa_jax.dot_product_attention
        monkeypatch.setattr(
            pasa_jax, "dot_product_attention", lambda *a, **k: seen.append(k) or true(*a, **k)
        )
        model(TOKENS[:, :8] % 50)
        assert seen == [{"is_causal": True}]

    def test_observe_sees_what_attention_is_given(self, model):
        tokens = TOKENS[:, :8] % 50
        q, k, v, layer = model.observe(tokens, lambda *heads: heads)
        assert (q.shape, k.shape) == ((2, 2, 8, 4, 8), (2, 2, 8, 2, 8))
        assert layer.tolist() == [0, 1]
        given = []

        def attention(q, k, v, layer):
            jax.debug.callback(lambda *x: given.append(x), q, k, v, layer)
            return pasa_jax.dot_product_attention(q, k, v, is_causal=True)

        jax.block_until_ready(model(tokens, attention=attention))
        jax.effects_barrier()
        for *heads, i in given:
            for one, all_layers in zip(heads, (q, k, v), strict=True):
                np.testing.assert_allclose(one, all_layers[i], atol=1e-6)
        assert len(given) == 2


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            np.zeros(3, np.int32),
            "`tokens` must be integers of shape [B, T], B and T at least 1; got int32[3].",
        ),
        (
            np.zeros((1, 3), np.float32),
            "`tokens` must be integers of shape [B, T], B and T at least 1; got float32[1, 3].",
        ),
        (
            np.zeros((1, 33), np.int32),
            "`tokens` must be at most max_length = 32 tokens long; got 33.",
        ),
        (
            np.array([[0, 50]]),
            "`tokens` must be ids in [0, 50); got 50. Is the tokenizer the model's?",
        ),
        (
            np.array([[0, -1]]),
            "`tokens` must be ids in [0, 50); got -1. Is the tokenizer the model's?",
        ),
    ],
)
def test_wrong_tokens(model, tokens, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole sentence is compared
        model(tokens)
    assert str(error.value) == message
