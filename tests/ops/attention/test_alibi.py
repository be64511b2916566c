"""ALiBi's slopes as published, and its bias."""

import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops.attention import alibi_bias, alibi_slopes

HALVES = [2.0**-h for h in range(1, 9)]


@pytest.mark.parametrize(
    ("num_heads", "expected"),
    [
        (1, [2.0**-8]),
        (2, [2.0**-4, 2.0**-8]),
        (3, [2.0**-4, 2.0**-8, 2.0**-2]),
        (8, HALVES),
        # Those of 8 heads and every other one of 16.
        (12, [*HALVES, 2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]),
    ],
)
def test_slopes(num_heads: int, expected: list[float]) -> None:
    slopes = alibi_slopes(num_heads)
    assert slopes.dtype == jnp.float32
    np.testing.assert_allclose(slopes, expected, rtol=1e-6)


def test_bias() -> None:
    q_positions, k_positions = jnp.asarray([[2, 3], [300, 301]]), jnp.asarray([[0, 2, 5]])
    bias = alibi_bias(alibi_slopes(4), q_positions, k_positions)
    assert bias.shape == (2, 4, 2, 3)
    assert bias.dtype == jnp.float32
    for b, h, t, s in np.ndindex(bias.shape):
        distance = abs(int(q_positions[b, t]) - int(k_positions[0, s]))
        assert float(bias[b, h, t, s]) == -(4.0 ** -(h + 1)) * distance
