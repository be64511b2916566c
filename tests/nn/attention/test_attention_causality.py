"""No hidden state knows of a later token, of another document, or of one out of its reach: exactly.

And of all others it does know.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_kinds import (
    INPUTS,
    KINDS,
    POSITIONS,
    SEGMENTS,
    WHOLE_MODELS,
    make_layer,
    make_model,
    with_random_parameters,
)
from flax import nnx
from versions import oldest_jax

from vqcx_jax.nn import Attention, Transformer, functional

pytestmark = oldest_jax

ONE_DOCUMENT = jnp.ones_like(SEGMENTS), jnp.zeros_like(SEGMENTS) + jnp.arange(9)


def influence_on(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """(B, T, T): |d function(x)[b, t] / d x[b, s]|, for a function that keeps rows apart."""
    out, vjp = jax.vjp(function, x)
    length = x.shape[1]
    cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    one_at_a_time = jnp.eye(length)[:, None, :, None] * cotangent
    (gradients,) = jax.vmap(vjp)(one_at_a_time)
    return jnp.abs(gradients).sum(axis=-1).swapaxes(0, 1)


@jax.jit
def influence_in_model(
    model: Transformer, segment_ids: jax.Array, positions: jax.Array
) -> jax.Array:
    """Of embedded inputs on final hidden states."""
    graphdef, params, buffers = functional.split(model)
    rows = jnp.arange(segment_ids.size).reshape(segment_ids.shape)

    def hidden(x_BxTxD: jax.Array) -> jax.Array:
        # A table with a row for each input: its gradient is the gradient by that input.
        table = {"embedding": {"table": x_BxTxD.reshape(-1, x_BxTxD.shape[-1])}}
        model = nnx.merge(graphdef, params | table, buffers)
        return model.hidden(rows, segment_ids, positions)

    return influence_on(hidden, jnp.asarray(INPUTS))


def visible(name: str, segment_ids: jax.Array, *, causal: bool = True) -> np.ndarray:
    """(B, T, T): which inputs a layer shows to each token, itself included."""
    index = np.arange(9)
    distance = index[:, None] - index
    mask = np.abs(distance) < (KINDS[name].window or 9)
    if causal:
        mask &= distance >= 0
    return mask & np.asarray(segment_ids[:, :, None] == segment_ids[:, None, :])


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_whole_model(name: str) -> None:
    model = make_model(name)
    for segment_ids, positions in ((SEGMENTS, POSITIONS), ONE_DOCUMENT):
        influence = influence_in_model(model, segment_ids, positions)
        # What the second layer sees has seen through the first.
        expected = np.linalg.matrix_power(visible(name, segment_ids).astype(int), 2) > 0
        np.testing.assert_array_equal(np.asarray(influence) != 0, expected)


@jax.jit
def influence_in_layer(layer: Attention, segment_ids: jax.Array) -> jax.Array:
    info = layer.encoding.info(segment_ids, POSITIONS)
    return influence_on(lambda x: layer(x, info)[0], jnp.asarray(INPUTS))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["complex", "complex_window_soft_cap", "alibi_window"])
def test_one_layer(name: str, causal: bool) -> None:
    """With causal=False later tokens are seen, which shows that this would be found."""
    layer = with_random_parameters(lambda: make_layer(KINDS[name], causal=causal))
    for segment_ids in (SEGMENTS, jnp.ones_like(SEGMENTS)):
        influence = np.asarray(influence_in_layer(layer, segment_ids))
        np.testing.assert_array_equal(influence != 0, visible(name, segment_ids, causal=causal))
