"""PyTorch's FlexAttention is asked: attention, gradients and block masks of the gallery."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import create_block_mask
from tests import gallery
from tests.cases import TILES
from tests.gallery import GALLERY, WIDTH

pytestmark = [
    pytest.mark.full,
    # Without torch.compile it forms all scores, and says so.
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason='pip install "pasa-jax[test-full]"')


def causal(torch, learned):
    return (lambda b, h, q, kv: kv <= q), None


def document(torch, learned):
    ids = torch.from_numpy(gallery.DOCUMENTS)
    return (lambda b, h, q, kv: (kv <= q) & (ids[b, q] == ids[b, kv])), None


def neighbourhood(torch, learned):
    def mask_mod(b, h, q, kv):
        rows, columns = q // WIDTH - kv // WIDTH, q % WIDTH - kv % WIDTH
        return (rows.abs() <= 2) & (columns.abs() <= 2)

    return mask_mod, None


def alibi(torch, learned):
    return None, lambda score, b, h, q, kv: score - learned["slope"][h] * (q - kv).abs()


def t5(torch, learned):
    starts = torch.tensor(gallery.THRESHOLDS)

    def score_mod(score, b, h, q, kv):
        bucket = (q - kv >= starts).sum()
        for i, column in enumerate(learned):
            score = score + torch.where(bucket == i, column[h], 0.0)
        return score

    return causal(torch, learned)[0], score_mod


def soft_cap(torch, learned):
    return None, lambda score, b, h, q, kv: 1.5 * torch.tanh(score / 1.5)


FLEX = {
    x.__name__.replace("_", " "): x for x in (causal, document, neighbourhood, alibi, t5, soft_cap)
}


def asked(torch, name, example, operands):
    """Output and log-sum-exp in float64 by FlexAttention, and the loss of `Example.weights`."""
    from torch.nn.attention import flex_attention as flex

    operands = jax.tree.map(torch.from_numpy, operands)
    mask_mod, score_mod = FLEX[name](torch, operands.get("learned"))
    mask = None
    if mask_mod is not None:
        sizes = (example.b, example.n, example.t, example.s)
        mask = flex.create_block_mask(mask_mod, *sizes, device="cpu", BLOCK_SIZE=16)
    out, aux = flex.flex_attention(
        *(operands[x].transpose(1, 2) for x in ("query", "key", "value")),
        score_mod=score_mod,
        block_mask=mask,
        enable_gqa=True,
        return_aux=flex.AuxRequest(lse=True),
    )
    out, lse = (x.transpose(1, 2).numpy() for x in (out, aux.lse))
    of_out, of_lse = example.weights()
    return out, lse, float(np.sum(out * of_out) + np.sum(lse * of_lse))


@pytest.mark.parametrize("name", FLEX)
def test_attention_and_gradients(torch, name):
    """FlexAttention has no backward pass on CPUs: its loss is differentiated by differences."""
    example = GALLERY[name]()
    arrays = example.arrays("float32")
    operands = jax.tree.map(lambda x: np.asarray(x, np.float64), dict(arrays))
    if example.learned is not None:
        learned = example.keywords[example.learned]
        operands["learned"] = jax.tree.map(lambda x: np.asarray(x, np.float64), learned)
    true_out, true_lse, _ = asked(torch, name, example, operands)
    out, lse, gradients = gallery.found(example, arrays, implementation="lax", schedule=TILES)
    np.testing.assert_allclose(out, true_out, atol=2e-6, rtol=0)
    np.testing.assert_allclose(lse, true_lse, atol=4e-6, rtol=0)
    rng, step = np.random.default_rng(0), 1e-5
    for argument, x in operands.items():
        way = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), x)

        def loss(factor, argument=argument, x=x, way=way):
            moved = jax.tree.map(lambda leaf, by: leaf + factor * by, x, way)
            return asked(torch, name, example, {**operands, argument: moved})[2]

        true = (loss(step) - loss(-step)) / (2 * step)
        found = sum(
            np.sum(np.asarray(g, np.float64) * to)
            for g, to in zip(
                jax.tree.leaves(gradients[argument]), jax.tree.leaves(way), strict=True
            )
        )
        size = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients[argument])))
        assert abs(found - true) < 2e-5 * size, argument


@pytest.mark.parametrize("name", ["causal", "document", "neighbourhood"])
@pytest.mark.parametrize("size", [16, (16, 32)])
def test_block_masks(torch, name, size):
    """Numbers, and as many indices as they count; of keys and of queries.

    Of whole blocks alone: FlexAttention says of those that reach beyond T or S that they are
    partly seen.
    """
    from torch.nn.attention import flex_attention as flex

    example = GALLERY[name]()
    cut = jax.tree.map(lambda x: x[:, :64], example.keywords.get("q_data"))
    data = {} if cut is None else {"q_data": cut, "kv_data": cut}
    ours = create_block_mask(example.keywords["mask_mod"], 2, None, 64, 64, size, **data)
    mask_mod, _ = FLEX[name](torch, None)
    theirs = flex.create_block_mask(mask_mod, 2, None, 64, 64, device="cpu", BLOCK_SIZE=size)
    lists = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
    of_queries = dict(zip(lists, ours.q_lists, strict=True))
    for kind in ("", "full_"):
        for side in ("kv", "q"):
            names = (f"{kind}{side}_num_blocks", f"{kind}{side}_indices")
            number, index = (of_queries.get(x, getattr(ours, x, None)) for x in names)
            true_number, true_index = (getattr(theirs, x).numpy() for x in names)
            np.testing.assert_array_equal(number, true_number)
            counts = np.arange(np.shape(index)[3]) < np.asarray(number)[..., None]
            np.testing.assert_array_equal(
                jnp.where(counts, index, 0), np.where(counts, true_index, 0)
            )
    np.testing.assert_array_equal(ours.to_dense(), theirs.to_dense().numpy())
    assert ours.sparsity() == pytest.approx(theirs.sparsity())
