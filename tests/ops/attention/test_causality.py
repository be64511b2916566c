"""No output knows of a later token, of another document, or of one outside its window: exactly."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import VARIANTS, make_inputs, table
from versions import oldest_jax

from vqcx_jax.ops.attention import (
    alibi_bias,
    alibi_slopes,
    attend,
    causal_mask,
    segment_mask,
    window_mask,
)

pytestmark = oldest_jax

LENGTH, HEAD_DIM = 7, 8
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 2, 3, 3, 0]])
POSITIONS = jnp.asarray([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 0, 1, 0]])
CAUSAL = causal_mask(LENGTH, LENGTH)
MASKS = {
    "causal": CAUSAL,
    "packed": CAUSAL & segment_mask(SEGMENTS, SEGMENTS),
    "window": CAUSAL & window_mask(LENGTH, LENGTH, 3),
    "packed_window": CAUSAL & segment_mask(SEGMENTS, SEGMENTS) & window_mask(LENGTH, LENGTH, 2),
    "both_sides": segment_mask(SEGMENTS, SEGMENTS) & window_mask(LENGTH, LENGTH, 3),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft_cap": {"soft_cap": 5.0},
    "alibi": {"bias": alibi_bias(alibi_slopes(4), POSITIONS, POSITIONS)},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, "plain") for name in VARIANTS), ("rope", "soft_cap"), ("rope", "alibi")],
)
def test_gradients_are_zero_where_the_mask_hides(name: str, options: str, mask: Any) -> None:
    """And nowhere else: encode and attend, each output by every query, key and value."""
    q, k, *parameters = make_inputs(name, 4, 2, HEAD_DIM, LENGTH)
    v = jnp.cos(k)
    mask = jnp.broadcast_to(mask, (2, 1, LENGTH, LENGTH))  # One compiled function for all.
    by_q, by_k, by_v = (np.asarray(x) for x in jacobians(name, options)(q, k, v, parameters, mask))
    visible = np.asarray(mask)[:, 0]
    np.testing.assert_array_equal(by_v != 0, visible)
    # A query with one key only has a constant output, whatever its score.
    several = visible & (visible.sum(-1, keepdims=True) > 1)
    np.testing.assert_array_equal(by_k != 0, several)
    own = several.any(axis=-1)[:, :, None] & np.eye(LENGTH, dtype=bool)
    np.testing.assert_array_equal(by_q != 0, own)


@cache
def jacobians(name: str, options: str) -> Any:
    """|d out[b, t] / d x[b, s]|, summed over heads and widths, (B, T, S) for x = q, k, v."""

    @jax.jit
    def run(q: Any, k: Any, v: Any, parameters: Any, mask: Any) -> Any:
        def output(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            cos, sin = table(name, HEAD_DIM, POSITIONS)
            q, k = VARIANTS[name].encode(q, k, cos, sin, *parameters)
            return attend(q, k, v, mask, scale=HEAD_DIM**-0.5, **OPTIONS[options])

        out, vjp = jax.vjp(output, q, k, v)
        cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        # One cotangent for each t; rows of the batch do not mix.
        gradients = jax.vmap(vjp)(jnp.eye(LENGTH)[:, None, :, None, None] * cotangent)
        return [jnp.moveaxis(jnp.sum(jnp.abs(g), axis=(-2, -1)), 0, 1) for g in gradients]

    return run
