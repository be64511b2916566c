"""Both hierarchies against their definitions in float64, in values and gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from versions import oldest_jax

from vqcx_jax.ops.hierarchical import class_size, huffman, huffman_paths, reference, two_level
from vqcx_jax.ops.hierarchical.two_level import TwoLevelWeights

pytestmark = oldest_jax

SIZES = {"smallest": (2, ()), "seven": (7, (3,)), "ragged": (37, (2, 5)), "square": (36, (40,))}
DIM = 8


class Layer(NamedTuple):
    """One hierarchy: parameters, -log p of targets, log p of all tokens, p by definition."""

    params: Any
    nll: Callable[..., jax.Array]
    log_probs: Callable[..., jax.Array]
    definition: Callable[..., jax.Array]


def make_two_level(vocab_size: int, with_bias: bool) -> Layer:
    normal = np.random.default_rng(0).standard_normal
    size = class_size(vocab_size)
    num_classes = -(-vocab_size // size)
    sizes = [min(size, vocab_size - c * size) for c in range(num_classes)]
    params = TwoLevelWeights(
        classes=jnp.asarray(normal((num_classes, DIM)), jnp.float32),
        tokens=jnp.asarray(normal((num_classes, size, DIM)), jnp.float32),
        class_bias=jnp.asarray(normal(num_classes), jnp.float32) if with_bias else None,
        token_bias=jnp.asarray(normal((num_classes, size)), jnp.float32) if with_bias else None,
    )

    def definition(h: Any, w: TwoLevelWeights) -> Any:
        rows = [w.tokens[c, :n] for c, n in enumerate(sizes)]
        biases = None
        if w.token_bias is not None:
            biases = [w.token_bias[c, :n] for c, n in enumerate(sizes)]
        return reference.two_level_probs(h, w.classes, rows, w.class_bias, biases)

    return Layer(
        params,
        lambda h, w, targets: two_level.nll(h, w, targets, vocab_size),
        lambda h, w: two_level.log_probs(h, w, vocab_size),
        definition,
    )


def make_huffman(vocab_size: int, with_bias: bool) -> Layer:
    rng = np.random.default_rng(0)
    paths = huffman_paths(rng.permutation(10_000 // np.arange(1, vocab_size + 1)))
    nodes = jnp.asarray(rng.standard_normal((vocab_size - 1, DIM)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(vocab_size - 1), jnp.float32) if with_bias else None
    children, paths = children_of(paths), jnp.asarray(paths)
    return Layer(
        (nodes, bias),
        lambda h, w, targets: huffman.nll(h, w[0], paths, targets, w[1]),
        lambda h, w: huffman.log_probs(h, w[0], paths, w[1]),
        lambda h, w: reference.tree_probs(h, w[0], children, w[1]),
    )


def children_of(paths: np.ndarray) -> list[tuple[int, int]]:
    """The tree that paths are made of; node and side of a step are those of the docstring."""
    vocab_size = len(paths)
    children = [[-1, -1] for _ in range(vocab_size - 1)]
    for token, path in enumerate(paths):
        child = token
        for step in path[path > 0]:
            node, side = divmod(int(step) - 1, 2)
            assert children[node][side] in (-1, child)
            children[node][side] = child
            child = vocab_size + node
        assert child == 2 * vocab_size - 2
    return [(first, second) for first, second in children]


MAKERS = {"two_level": make_two_level, "huffman": make_huffman}


def make_inputs(vocab_size: int, leading: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(1)
    h = jnp.asarray(rng.standard_normal((*leading, DIM)), dtype)
    weight = jnp.asarray(rng.standard_normal(leading), jnp.float32)
    return h, jnp.asarray(rng.integers(vocab_size, size=leading), jnp.int32), weight


def with_gradients(nll: Callable[..., Any]) -> Callable[..., Any]:
    """Losses, and gradients of a weighted sum of them by h and parameters."""

    def function(h: Any, params: Any, targets: Any, weight: Any) -> Any:
        values, vjp = jax.vjp(lambda h, p: nll(h, p, targets), h, params)
        return values, vjp(weight)

    return function


def by_definition(layer: Layer) -> Callable[..., Any]:
    def nll(h: Any, params: Any, targets: Any) -> Any:
        p = layer.definition(h, params)
        return -jnp.log(jnp.take_along_axis(p, targets[..., None], -1)[..., 0])

    return nll


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", MAKERS)
def test_float32_values_and_gradients(
    kind: str, size: str, with_bias: bool, in_float64: Any, max_error: Any
) -> None:
    vocab_size, leading = SIZES[size]
    layer = MAKERS[kind](vocab_size, with_bias)
    h, targets, weight = make_inputs(vocab_size, leading)
    values, gradients = jax.jit(with_gradients(layer.nll))(h, layer.params, targets, weight)
    expected = in_float64(with_gradients(by_definition(layer)), h, layer.params, targets, weight)
    chex.assert_shape(values, leading)
    assert values.dtype == jnp.float32
    chex.assert_trees_all_close(values, expected[0], rtol=1e-5, atol=1e-6)
    for actual, true in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected[1]), strict=True):
        if np.any(true):  # A single class has no choice, and no gradient.
            assert max_error(actual, true) <= 1e-5
        else:
            assert not np.any(actual)


@pytest.mark.parametrize("kind", MAKERS)
def test_bfloat16_hidden_states(kind: str, in_float64: Any, max_error: Any) -> None:
    """Many positions: their gradients by one row are added in float32."""
    layer = MAKERS[kind](7, True)
    h, targets, weight = make_inputs(7, (2, 300), jnp.bfloat16)
    values, gradients = jax.jit(with_gradients(layer.nll))(h, layer.params, targets, weight)
    rounded = jax.tree.map(
        lambda p: p.astype(jnp.bfloat16) if p.shape[-1] == DIM else p, layer.params
    )
    expected = in_float64(with_gradients(by_definition(layer)), h, rounded, targets, weight)
    assert values.dtype == jnp.float32
    chex.assert_trees_all_close(values, expected[0], rtol=1e-5, atol=1e-6)
    for actual, true in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected[1]), strict=True):
        assert actual.dtype == (jnp.bfloat16 if actual.shape == h.shape else jnp.float32)
        # d loss / d logits and each row's own products are rounded, their sum is not.
        assert max_error(actual, true) <= 2.0**-7


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", MAKERS)
def test_log_probs_are_the_definition_and_add_up_to_one(
    kind: str, size: str, in_float64: Any
) -> None:
    vocab_size, leading = SIZES[size]
    layer = MAKERS[kind](vocab_size, True)
    h, _, _ = make_inputs(vocab_size, leading)
    log_p = jax.jit(layer.log_probs)(h, layer.params)
    chex.assert_shape(log_p, (*leading, vocab_size))
    expected = np.log(in_float64(layer.definition, h, layer.params))
    chex.assert_trees_all_close(log_p, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(np.exp(np.float64(log_p)).sum(-1), np.ones(leading), rtol=1e-6)


@pytest.mark.parametrize("kind", MAKERS)
def test_nan_stays_at_its_position(kind: str) -> None:
    layer = MAKERS[kind](101, True)
    h, targets, _ = make_inputs(101, (2, 3))
    values = jax.jit(layer.nll)(h.at[1, 2, 0].set(jnp.nan), layer.params, targets)
    np.testing.assert_array_equal(np.isnan(values), [[False] * 3, [False, False, True]])


@pytest.mark.parametrize("kind", MAKERS)
def test_inside_shard_map(kind: str) -> None:
    layer = MAKERS[kind](101, True)
    h, targets, weight = make_inputs(101, (8, 3))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharded = jax.shard_map(
        layer.nll, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data")
    )
    expected = jax.jit(with_gradients(layer.nll))(h, layer.params, targets, weight)
    with jax.set_mesh(mesh):
        h, targets, weight = (
            jax.device_put(x, jax.NamedSharding(mesh, P("data"))) for x in (h, targets, weight)
        )
        params = jax.device_put(layer.params, jax.NamedSharding(mesh, P()))
        actual = jax.jit(with_gradients(sharded))(h, params, targets, weight)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "columns"), [("two_level", 2 * 101), ("huffman", 25)])
def test_work_per_position_is_that_of_a_few_rows(kind: str, columns: int) -> None:
    """V = 10,000: no product and no array of the loss has N V entries."""
    layer = MAKERS[kind](10_000, False)
    h, targets, _ = make_inputs(10_000, (400,))
    cost = jax.jit(layer.nll).lower(h, layer.params, targets).compile().cost_analysis()
    assert cost["flops"] <= 3 * 400 * 2 * DIM * (columns + 100)


def test_one_class_of_one_token() -> None:
    layer = make_two_level(1, True)
    h, targets, _ = make_inputs(1, (3,))
    np.testing.assert_array_equal(layer.nll(h, layer.params, targets), np.zeros(3))
