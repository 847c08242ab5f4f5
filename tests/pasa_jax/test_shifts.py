"""β, M and Inva against the paper's figures."""

import numpy as np
import pytest

from pasa_jax.core.shifts import PAPER_STARTS, optimal_beta, paper_matrix

PAPER_BETA = {
    64: (0.9375, 0.96875, 0.98461914),
    128: (0.9375, 0.96899414, 0.98449707),
    256: (0.93774414, 0.96887207, 0.98443604),
    512: (0.93762207, 0.96881104, 0.98440552),
}


@pytest.mark.parametrize("n", PAPER_BETA)
def test_optimal_beta_is_the_papers(n):
    found = [optimal_beta(n, start) for start in PAPER_STARTS]
    np.testing.assert_allclose(found, PAPER_BETA[n], atol=5e-9)


def test_inva_of_the_rounded_matrix():
    columns, float16 = np.ones(128, bool), np.dtype(np.float16)
    beta = optimal_beta(128)
    # 1/√64 is a power of two, and Inva is β/(1 − β); at D = 128 the paper's 63.5 is 64.41.
    assert paper_matrix(columns, beta, 1 / 8, float16)[1] == pytest.approx(beta / (1 - beta))
    assert paper_matrix(columns, beta, 128**-0.5, float16)[1] == pytest.approx(64.41, abs=5e-3)


def test_tail_matrix_leaves_other_columns_alone():
    columns = np.arange(8) >= 5
    matrix, _ = paper_matrix(columns, 0.9, 0.25, np.dtype(np.float16))
    assert np.all(matrix[:5] == 0)
    assert np.all(matrix[:, :5] == 0)
    np.testing.assert_allclose(matrix[5:, 5:].sum(1), 0.1 * 0.25, atol=1e-3)


@pytest.mark.parametrize("start", [0, 1, -0.5, 1.5])
def test_start_out_of_range(start):
    with pytest.raises(ValueError, match=r"`start` must lie strictly between 0 and 1; got"):
        optimal_beta(128, start)


def test_no_fixed_point():
    with pytest.raises(ValueError, match="must be positive"):
        optimal_beta(0)
