"""The loss of a packed batch: sums over tokens, not over padding."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.nn import Transformer, functional
from vqcx_jax.nn.loss import nll_by_position, summed_nll
from vqcx_jax.ops.labels import IGNORE_ID


def test_sums_over_tokens(
    make_model: Callable[..., Transformer], batch: dict[str, jax.Array]
) -> None:
    model = make_model()
    parts = functional.split(model)
    loss = jax.jit(summed_nll, static_argnums=0)
    total, (nll, tokens) = loss(*parts, batch, 0.25)
    h = jax.jit(Transformer.hidden)(
        model, batch["inputs"], batch["segment_ids"], batch["positions"]
    )
    each_nll, each_log_z = jax.jit(lambda m, h, t: m.head.nll(h, t))(model, h, batch["targets"])
    is_token = np.asarray(batch["segment_ids"]) != 0
    assert tokens == is_token.sum() == 15
    expected = np.asarray(each_nll)[is_token].sum()
    chex.assert_trees_all_close(nll, expected, rtol=1e-5)
    z_term = 0.25 * (np.asarray(each_log_z)[is_token] ** 2).sum()
    chex.assert_trees_all_close(total, expected + z_term, rtol=1e-5)

    # What stands in padding changes nothing, bit for bit.
    other = {
        name: jnp.where(jnp.asarray(is_token), x, x if name == "segment_ids" else 7)
        for name, x in batch.items()
    }
    chex.assert_trees_all_equal(loss(*parts, other, 0.25), (total, (nll, tokens)))


def test_ignored_labels_are_no_tokens(
    make_model: Callable[..., Transformer], batch: dict[str, jax.Array]
) -> None:
    parts = functional.split(make_model())
    is_ignored = jnp.arange(batch["targets"].shape[1]) % 3 == 1
    is_token = np.asarray((batch["segment_ids"] != 0) & ~is_ignored)
    batch = batch | {"targets": jnp.where(is_ignored, IGNORE_ID, batch["targets"])}
    _, (nll, tokens) = jax.jit(summed_nll, static_argnums=0)(*parts, batch)
    assert 0 < tokens == is_token.sum() < np.sum(np.asarray(batch["segment_ids"]) != 0)
    by_position = jax.jit(nll_by_position, static_argnums=0)(*parts, batch, jnp.asarray([2]))
    chex.assert_trees_all_close(by_position[0].sum(), nll, rtol=1e-5)
    assert by_position[1].sum() == tokens
