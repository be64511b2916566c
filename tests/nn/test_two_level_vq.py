"""The two-level head: the interface of every head, and its own sampler."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import nnx

from vqcx_jax import sharding
from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.nn import functional
from vqcx_jax.nn.heads import TwoLevelVQHead
from vqcx_jax.ops.codebook import two_level

V, D = 24, 8
LEVELS = two_level.levels(np.random.default_rng(0).permutation(V) % 5, 5, 6)


def make_head(token_bias: bool = True, rules: ShardingRules | None = None) -> Any:
    head = TwoLevelVQHead(LEVELS, D, token_bias=token_bias, rules=rules, rngs=nnx.Rngs(0))
    graphdef, params, buffers = functional.split(head)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
    return nnx.merge(graphdef, params, buffers)


@pytest.fixture(scope="module")
def h() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (4, 6, D))


@pytest.mark.parametrize("token_bias", [True, False])
def test_nll_and_top_k_are_those_of_the_logits(token_bias: bool, h: jax.Array) -> None:
    head = make_head(token_bias)
    targets = jnp.arange(24).reshape(4, 6)
    (nll, log_z), z, (log_probs, tokens) = jax.jit(
        lambda head, h: (head.nll(h, targets), head.logits(h), head.top_k(h, 5))
    )(head, h)
    assert not np.any(log_z)
    chex.assert_trees_all_close(scipy.special.logsumexp(np.float64(z), axis=-1), 0, atol=1e-5)
    expected = -np.take_along_axis(np.asarray(z), np.asarray(targets)[..., None], axis=-1)[..., 0]
    chex.assert_trees_all_close(nll, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(tokens, jax.lax.top_k(z, 5)[1])
    chex.assert_trees_all_close(log_probs, jax.lax.top_k(z, 5)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"top_k": 4}], ids=str)
def test_samples(options: dict[str, Any], h: jax.Array) -> None:
    head, row = make_head(), h[:1, :1]
    rows = jnp.broadcast_to(row, (20, 500, D))
    tokens = jax.jit(lambda head: head.sample(rows, jax.random.key(0), **options))(head)
    p = scipy.special.softmax(np.float64(head.logits(row)[0, 0]) / options.get("temperature", 1))
    p[np.argsort(-p)[options.get("top_k", V) :]] = 0
    counts = np.bincount(tokens.ravel(), minlength=V)
    assert not counts[p == 0].any()
    # A right sampler fails once in 10^4; rare tokens count together.
    rare = p < 1e-3
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = 10_000 * np.append(p[~rare], p[rare].sum()) / p.sum()
    keep = expected > 0
    assert scipy.stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-4


@pytest.mark.parametrize("axis_type", ["explicit", "auto"])
def test_loss_and_gradients_on_a_mesh(axis_type: str, h: jax.Array) -> None:
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, axis_type)
    head, targets, rules = make_head(), jnp.arange(24).reshape(4, 6), ShardingRules()
    graphdef, params, buffers = functional.split(head)

    @jax.jit
    def loss_and_gradients(params: Any, buffers: Any, h: jax.Array, targets: jax.Array) -> Any:
        def loss(params: Any, h: jax.Array) -> jax.Array:
            return jnp.sum(nnx.merge(graphdef, params, buffers).nll(h, targets)[0])

        return jax.value_and_grad(loss, (0, 1))(params, h)

    expected = loss_and_gradients(params, buffers, h, targets)
    with jax.set_mesh(mesh):
        arrays = jax.device_put((params, buffers), functional.shardings(head, mesh, rules))
        batch = jax.device_put(
            (h, targets),
            (
                sharding.named_sharding(mesh, ("batch", None, None), rules),
                sharding.named_sharding(mesh, ("batch", None), rules),
            ),
        )
        actual = loss_and_gradients(*arrays, *batch)
    chex.assert_trees_all_close(jax.device_get(actual), expected, rtol=1e-5, atol=1e-5)
