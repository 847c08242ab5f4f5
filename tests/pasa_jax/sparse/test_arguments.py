"""What every chooser does: compile, take narrow types, and refuse wrong arguments by name."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import BlockMask, dot_product_attention, sparse
from tests.pasa_jax.sparse.draws import arrays, kept, relative

CHOOSERS = {
    "vertical_slash": lambda q, k, **x: sparse.vertical_slash(
        q, k, vertical=8, slash=8, sinks=2, local=2, **x
    ),
    "xattention": lambda q, k, **x: sparse.xattention(q, k, stride=4, **x),
    "share_prefill": lambda q, k, **x: sparse.share_prefill(q, k, [[0, 2]], **x),
}


@pytest.mark.full
def test_a_compiled_chooser_of_16_bits_has_float32_statistics():
    q, k, _ = arrays(37, 61, n=4, k=2, b=2, dtype="bfloat16")
    choose = jax.jit(lambda q, k: sparse.xattention(q, k, stride=4, block_size=16))
    mask = choose(q, k)
    assert isinstance(mask, BlockMask)
    assert mask.shape == (2, 4, 37, 61)
    assert np.array_equal(kept(choose(*(x.astype(jnp.float32) for x in (q, k)))), kept(mask))


@pytest.mark.full
@pytest.mark.parametrize("name", CHOOSERS)
def test_a_compiled_chooser_of_16_bits_feeds_attention(name):
    q, k, v = arrays(37, 61, n=4, k=2, b=2, dtype="bfloat16")

    @jax.jit
    def both(q, k, v):
        mask = CHOOSERS[name](q, k, block_size=16)
        options = {"is_causal": True, "causal_alignment": "bottom_right"}
        return mask, dot_product_attention(q, k, v, block_mask=mask, **options)

    mask, out = both(q, k, v)
    assert isinstance(mask, BlockMask)
    assert mask.shape == (2, 4, 37, 61)
    wide = CHOOSERS[name](*(x.astype(jnp.float32) for x in (q, k)), block_size=16)
    assert np.array_equal(kept(wide), kept(mask))  # the statistics are float32
    seen = np.repeat(np.repeat(kept(mask), 16, 2), 16, 3)[:, :, :37, :61]
    exact = dot_product_attention(
        q, k, v, is_causal=True, causal_alignment="bottom_right", mask=jnp.asarray(seen)
    )
    assert relative(out, np.asarray(exact, np.float64)) < 1e-2


@pytest.mark.full
def test_the_scale_is_that_of_the_scores():
    q, k, _ = arrays(64, 64, size=3.0)
    for name, choose in CHOOSERS.items():
        if name == "share_prefill":
            continue
        by_scale = choose(q, k, scale=0.5, block_size=8)
        by_query = choose(q * (0.5 * np.sqrt(8)).astype(np.float32), k, block_size=8)
        assert np.array_equal(kept(by_scale), kept(by_query)), name


Q, K, V = arrays(40, 48, n=4, k=2)
BAD = {
    "T": (lambda: sparse.xattention(K, K[:, :9]), "`T` must be at most S = 9; got 48."),
    "k": (lambda: sparse.xattention(Q, K[..., :4]), "`k` must be [1, S, K, 8], K a divisor of 4;"),
    "dtype": (
        lambda: sparse.vertical_slash(Q, K.astype(jnp.bfloat16)),
        "`k` must be of q's type float32; got bfloat16. Cast one of them.",
    ),
    "q": (lambda: sparse.line_scores(Q[0], K), "`q` must be [B, T, N, D], no size of which is 0;"),
    "integers": (
        lambda: sparse.line_scores(Q.astype(jnp.int32), K),
        "`q` must be of type float16, bfloat16, float32, float64; got int32.",
    ),
    "stride": (
        lambda: sparse.xattention(Q, K, stride=24),
        "`stride` must be a divisor of block_size = 128; got 24.",
    ),
    "threshold": (
        lambda: sparse.xattention(Q, K, threshold=0.0),
        "`threshold` must be a number in (0, 1]; got 0.0.",
    ),
    "scale": (
        lambda: sparse.xattention(Q, K, scale=float("nan")),
        "`scale` must be a finite number or None; got nan.",
    ),
    "block_size": (
        lambda: sparse.vertical_slash(Q, K, block_size=0),
        "`block_size` must be an int of at least 1; got 0.",
    ),
    "vertical": (
        lambda: sparse.vertical_slash(Q, K, vertical=-1),
        "`vertical` must be an int of at least 0; got -1.",
    ),
    "columns": (
        lambda: sparse.vertical_slash_of(jnp.ones((1, 2, 9)), jnp.ones((1, 2, 8)), 4),
        "`diagonals` must be floating, [B, N, S], both of one shape; got float32[1, 2, 8].",
    ),
    "clusters twice": (
        lambda: sparse.share_prefill(Q, K, [[0, 1], [1]]),
        "`clusters` must be lists of query heads below 4, no head in two places, none empty; "
        "got [[0, 1], [1]]. A head may be in no cluster.",
    ),
    "clusters beyond": (lambda: sparse.share_prefill(Q, K, [[0, 4]]), "got [[0, 4]]."),
    "clusters empty": (lambda: sparse.share_prefill(Q, K, [[]]), "got [[]]."),
    "clusters flat": (lambda: sparse.share_prefill(Q, K, [0, 1]), "got [0, 1]."),  # type: ignore
    "window": (
        lambda: sparse.sink_window(8, 8, 1, 0),
        "`window` must be an int of at least 1; got 0.",
    ),
    "sparse_out": (
        lambda: sparse.delta_correction(Q[:, :9], Q, K, V),
        "`sparse_out` must be [B, T, N, E] = [1, 40, 4, 8]; got (1, 9, 4, 8).",
    ),
    "gamma": (
        lambda: sparse.delta_correction(Q, Q, K, V, 0),
        "`gamma` must be an int of at least 1; got 0.",
    ),
    "options": (
        lambda: sparse.delta_correction(Q, Q, K, V, mask=None),
        "`options` must be of scale, logits_soft_cap, implementation, shift, beta, precision, "
        "schedule, sinks; got 'mask'.",
    ),
    "sinks": (lambda: sparse.dropped_keys(Q, K, V, sinks=None), "got 'sinks'."),
    "keep_k": (
        lambda: sparse.dropped_keys(Q, K, V, keep_k=jnp.ones((1, 48))),
        "`keep_k` must be bool, [1, 48] or [1, 48, 2]; got float32[1, 48].",
    ),
    "q_buckets": (
        lambda: sparse.hash_buckets(Q, K, V, jnp.ones((1, 48), int), jnp.ones((1, 48), int)),
        "`q_buckets` must be integers, [1, 40] or [1, 40, 4]; got int32[1, 48].",
    ),
    "v": (
        lambda: sparse.dropped_keys(Q, K, V[:, :9]),
        "`v` must be [B, S, K, E] with k's [1, 48, 2]; got (1, 9, 2, 8).",
    ),
    "count": (
        lambda: sparse.random_buckets(Q, 3, jax.random.key(0)),
        "`count` must be even; got 3.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named(case):
    call, sentence = BAD[case]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()
