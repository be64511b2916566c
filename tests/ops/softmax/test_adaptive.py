"""Adaptive softmax: its definition, an oracle in numpy, and PyTorch where it is installed."""

from collections.abc import Callable
from typing import Any

import adaptive_in_torch
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from versions import oldest_jax

from vqcx_jax.ops.softmax import adaptive, reference
from vqcx_jax.ops.softmax.adaptive import AdaptiveWeights, Cluster, cluster_shapes

pytestmark = oldest_jax

DIM = 16
CASES: dict[str, dict[str, Any]] = {
    "two_clusters": dict(vocab_size=47, cutoffs=(10, 30)),
    "head_bias": dict(vocab_size=47, cutoffs=(10, 30), with_bias=True),
    "one_cluster": dict(vocab_size=7, cutoffs=(2,), div_value=2.0, with_bias=True),
    "clusters_of_one": dict(vocab_size=7, cutoffs=(1, 2, 6), div_value=2.0),
    "div_value_1": dict(vocab_size=21, cutoffs=(10, 15), div_value=1.0),
}


def make(
    vocab_size: int,
    cutoffs: tuple[int, ...],
    div_value: float = 4.0,
    with_bias: bool = False,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, AdaptiveWeights, jax.Array]:
    """Hidden states, weights, and every rank as a target."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    rows = cutoffs[0] + len(cutoffs)
    weights = AdaptiveWeights(
        normal(rows, DIM) / 4,
        normal(rows).astype(jnp.float32) if with_bias else None,
        tuple(
            Cluster(normal(width, DIM) / 4, normal(size, width))
            for size, width in cluster_shapes(vocab_size, DIM, cutoffs, div_value)
        ),
    )
    ranks = jnp.asarray(rng.permutation(vocab_size))
    return normal(vocab_size, DIM), weights, ranks


def with_gradients(nll: Callable[..., Any]) -> Callable[..., Any]:
    def function(h: Any, weights: AdaptiveWeights, ranks: Any) -> Any:
        values, vjp = jax.vjp(lambda h, w: nll(h, w, ranks), h, weights)
        return values, vjp(jnp.linspace(-1.0, 2.0, len(ranks), dtype=values.dtype))

    return function


def definition(h: Any, weights: AdaptiveWeights, ranks: Any) -> Any:
    p = reference.adaptive_probs(h, *weights)
    return -jnp.log(jnp.take_along_axis(p, ranks[..., None], -1)[..., 0])


@pytest.mark.parametrize("name", CASES)
def test_float32_values_and_gradients(name: str, in_float64: Any, max_error: Any) -> None:
    x = make(**CASES[name])
    values, gradients = jax.jit(with_gradients(adaptive.nll))(*x)
    true_values, true_gradients = in_float64(with_gradients(definition), *x)
    chex.assert_trees_all_close(values, true_values, rtol=1e-5, atol=1e-6)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(true_gradients))
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True)
    for actual, expected in pairs:
        # A cluster of one token has no gradient, by definition up to roundings.
        chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-5 * scale)


def test_bfloat16(in_float64: Any, assert_as_good_as: Any) -> None:
    x = make(**CASES["head_bias"], dtype=jnp.bfloat16)
    actual = jax.jit(with_gradients(adaptive.nll))(*x)
    assert actual[0].dtype == jnp.float32
    plain = jax.jit(with_gradients(definition))(*x)
    assert_as_good_as(plain, actual, in_float64(with_gradients(definition), *x))


@pytest.mark.parametrize("name", CASES)
def test_log_probs_add_up_to_one(name: str, in_float64: Any) -> None:
    h, weights, _ = make(**CASES[name])
    log_p = jax.jit(adaptive.log_probs)(h, weights)
    expected = np.log(in_float64(lambda h, w: reference.adaptive_probs(h, *w), h, weights))
    chex.assert_trees_all_close(log_p, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(np.exp(np.float64(log_p)).sum(-1), np.ones(len(h)), rtol=1e-6)


def test_oracle_in_numpy() -> None:
    """By hand, independent of JAX: log p = head[cluster] + cluster[token], with its gradient by h.

    The gradient is that of finite differences, which float64 gives to 1e-7 or so.
    """
    h, weights, ranks = jax.tree.map(np.float64, make(**CASES["head_bias"]))
    ranks, cutoffs = ranks.astype(int), (10, 30, 47)

    def log_softmax(z: np.ndarray) -> np.ndarray:
        return z - np.log(np.exp(z).sum())

    def loss(h: np.ndarray) -> np.ndarray:
        losses = []
        for h_D, rank in zip(h, ranks, strict=True):
            head = log_softmax(weights.head @ h_D + weights.bias)
            if rank < cutoffs[0]:
                losses.append(-head[rank])
                continue
            i = 0 if rank < cutoffs[1] else 1
            down, up = weights.clusters[i]
            inside = log_softmax(up @ (down @ h_D))
            losses.append(-head[cutoffs[0] + i] - inside[rank - cutoffs[i]])
        return np.asarray(losses)

    x = make(**CASES["head_bias"])
    values = adaptive.nll(*x)
    chex.assert_trees_all_close(values, loss(h), rtol=1e-5)
    direction = np.random.default_rng(1).standard_normal(h.shape)
    slope = (loss(h + 1e-5 * direction) - loss(h - 1e-5 * direction)) / 2e-5
    tangent = jax.grad(lambda h: adaptive.nll(h, *x[1:]).sum())(x[0])
    chex.assert_trees_all_close(np.sum(tangent * direction, axis=-1), slope, rtol=1e-4, atol=1e-5)


def for_torch(name: str) -> tuple[Any, ...]:
    """Arguments of `adaptive_in_torch.results`."""
    h, weights, ranks = make(**CASES[name])
    in_torch = {"head.weight": weights.head}
    if weights.bias is not None:
        in_torch["head.bias"] = weights.bias
    for i, (down, up) in enumerate(weights.clusters):
        in_torch |= {f"tail.{i}.0.weight": down, f"tail.{i}.1.weight": up}
    coefficients = np.linspace(-1.0, 2.0, len(ranks), dtype=np.float32)
    return (
        np.array(h),
        {n: np.array(w) for n, w in in_torch.items()},
        np.array(ranks),
        coefficients,
        CASES[name]["cutoffs"],
        CASES[name].get("div_value", 4.0),
    )


@pytest.mark.parametrize("name", CASES)
def test_same_as_pytorch(name: str) -> None:
    """On copied weights: losses, all log-probabilities and all gradients."""
    h, weights, ranks = make(**CASES[name])
    with np.load(adaptive_in_torch.PATH) as file:
        of_case = [(n.removeprefix(f"{name}/"), file[n]) for n in file if n.startswith(f"{name}/")]
    expected = dict(of_case)
    values, (d_h, d_weights) = jax.jit(with_gradients(adaptive.nll))(h, weights, ranks)
    actual = {"nll": values, "log_probs": adaptive.log_probs(h, weights), "hidden": d_h}
    actual["head.weight"] = d_weights.head
    if d_weights.bias is not None:
        actual["head.bias"] = d_weights.bias
    for i, (down, up) in enumerate(d_weights.clusters):
        actual |= {f"tail.{i}.0.weight": down, f"tail.{i}.1.weight": up}
    assert actual.keys() == expected.keys()
    for n, array in expected.items():
        tolerance = 1e-4 if "." in n else 1e-5  # Sums over positions.
        chex.assert_trees_all_close(actual[n], array, rtol=tolerance, atol=tolerance)


def test_nan_stays_at_its_position() -> None:
    h, weights, ranks = make(**CASES["two_clusters"])
    values = jax.jit(adaptive.nll)(h.at[3, 0].set(jnp.nan), weights, ranks)
    np.testing.assert_array_equal(np.isnan(values), np.arange(47) == 3)


def test_inside_shard_map() -> None:
    h, weights, ranks = make(vocab_size=48, cutoffs=(10, 20), with_bias=True)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharded = jax.shard_map(
        adaptive.nll, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data")
    )
    expected = jax.jit(with_gradients(adaptive.nll))(h, weights, ranks)
    with jax.set_mesh(mesh):
        h, ranks = (jax.device_put(x, jax.NamedSharding(mesh, P("data"))) for x in (h, ranks))
        weights = jax.device_put(weights, jax.NamedSharding(mesh, P()))
        values, vjp = jax.jit(lambda h, w: jax.vjp(lambda h, w: sharded(h, w, ranks), h, w))(
            h, weights
        )
        cotangent = jnp.linspace(-1.0, 2.0, 48)
        gradients = jax.jit(lambda ct: vjp(ct))(
            jax.device_put(cotangent, jax.NamedSharding(mesh, P("data")))
        )
    chex.assert_trees_all_close((values, gradients), expected, rtol=1e-5, atol=1e-5)


def test_cluster_shapes() -> None:
    assert cluster_shapes(100, 64, (10, 30), 4.0) == [(20, 16), (70, 4)]
    assert cluster_shapes(100, 100, (10,), 3.0) == [(90, 33)]
