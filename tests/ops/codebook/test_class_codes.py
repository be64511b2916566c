"""Product codes in classes against their definition in float64."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from class_cases import CLASSES, C, M, V, class_of, make, make_weights
from versions import oldest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops.codebook import classes, reference

# As users compile it.
pytestmark = [oldest_jax, pytest.mark.usefixtures("fully_optimized")]


def of_definition(h: Any, weights: Any, targets: Any) -> Any:
    scale = jnp.ones(V + C, h.dtype) if weights.scale is None else weights.scale
    bias = jnp.zeros(V + C, h.dtype) if weights.bias is None else weights.bias
    log_p = reference.class_log_probs(
        h, weights.codebooks, weights.codes.of_nodes, scale, bias, jnp.asarray(class_of())
    )
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], log_p


def fast(h: Any, weights: Any, targets: Any) -> Any:
    nll = classes.nll(h, weights, CLASSES, targets)
    return nll, classes.log_probs(h, weights, CLASSES)


def gradients(function: Any, result: int) -> Any:
    def run(h: Any, weights: Any, targets: Any) -> Any:
        def loss(h: Any, codebooks: Any, scale: Any, bias: Any) -> Any:
            replaced = weights._replace(codebooks=codebooks, scale=scale, bias=bias)
            return jnp.sum(jnp.sin(function(h, replaced, targets)[result]))

        return jax.grad(loss, (0, 1, 2, 3))(h, weights.codebooks, weights.scale, weights.bias)

    return run


@pytest.mark.parametrize(("num_codes", "dtype"), [(256, "uint8"), (257, "int32")])
def test_codes_in_all_orders(num_codes: int, dtype: str) -> None:
    codes = np.random.default_rng(0).integers(num_codes, size=(V + C, M))
    codes[0] = num_codes - 1
    found = classes.arrange_codes(jnp.asarray(codes), CLASSES, num_codes)
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(found.of_nodes, codes)
    np.testing.assert_array_equal(found.of_entries, codes[np.asarray(CLASSES.entries)])
    for token in np.flatnonzero(class_of() >= 0):
        of_token = found.of_members[class_of()[token], :, CLASSES.rank_of[token]]
        np.testing.assert_array_equal(of_token, codes[token])


def test_classes_can_be_read_in_all_directions() -> None:
    entries, entry_of, members, rank_of = map(np.asarray, CLASSES)
    nodes = entries[entry_of]
    is_frequent = class_of() < 0
    np.testing.assert_array_equal(nodes[is_frequent], np.flatnonzero(is_frequent))
    np.testing.assert_array_equal(nodes[~is_frequent] - V, class_of()[~is_frequent])
    in_class = members[class_of()[~is_frequent], rank_of[~is_frequent]]
    np.testing.assert_array_equal(in_class, np.flatnonzero(~is_frequent))
    assert np.sum(members >= 0) == V - 10
    assert classes.num_frequent(CLASSES) == 10


@pytest.mark.parametrize(
    ("class_of", "options", "message"),
    [
        ([0, 2, -1], {}, "class_of: class 1 has no token"),
        ([0, 1, 3], {}, r"class_of: must be in \[-1, 3\)"),
        ([-2, 0, 1, 2], {}, r"class_of: must be in \[-1, 3\)"),
        ([0, 1, 2, 2], {"num_ranks": 1}, "num_ranks=1: must be at least 2, the largest class"),
    ],
)
def test_wrong_classes(class_of: list[int], options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        classes.arrange(np.asarray(class_of), 3, **options)


@pytest.mark.parametrize(
    ("scale", "bias", "dtype"),
    [
        (True, True, jnp.float32),
        (True, True, jnp.bfloat16),
        (False, True, jnp.float32),
        (True, False, jnp.bfloat16),
        (False, False, jnp.float32),
    ],
)
def test_equals_the_definition(
    scale: bool, bias: bool, dtype: Any, in_float64: Any, max_error: Any, assert_as_good_as: Any
) -> None:
    inputs = make(dtype, bias, scale)
    runs = [lambda f: f, lambda f: gradients(f, 0), lambda f: gradients(f, 1)]
    actual = [jax.jit(run(fast))(*inputs) for run in runs]
    true = [in_float64(run(of_definition), *inputs) for run in runs]
    if dtype == jnp.bfloat16:
        h, weights, targets = inputs
        floats = {n: getattr(weights, n) for n in ("codebooks", "scale", "bias")}
        narrow = weights._replace(**jax.tree.map(lambda x: x.astype(dtype), floats))
        assert_as_good_as(
            [jax.jit(run(of_definition))(h, narrow, targets) for run in runs], actual, true
        )
        return
    chex.assert_trees_all_close(actual[0], true[0], rtol=1e-5, atol=1e-5)
    for a, t in zip(jax.tree.leaves(actual[1:]), jax.tree.leaves(true[1:]), strict=True):
        assert max_error(a, t) <= 1e-5


def test_probabilities_add_up() -> None:
    h, weights, _ = make(jnp.float32)
    total = np.exp(np.float64(classes.log_probs(h, weights, CLASSES))).sum(axis=-1)
    np.testing.assert_allclose(total, 1, rtol=1e-5)


@pytest.mark.parametrize("target", [-100, V])
def test_targets_that_are_no_tokens_are_refused(target: int) -> None:
    h, weights, targets = make(jnp.float32)
    with pytest.raises(UserError, match="targets"):
        classes.nll(h, weights, CLASSES, targets.at[0, 0].set(target))


def test_targets_and_counts_of_another_shape_are_refused() -> None:
    h, weights, targets = make(jnp.float32)
    with pytest.raises(UserError, match="targets has shape"):
        classes.nll(h, weights, CLASSES, targets[:, :1])
    with pytest.raises(UserError, match="counts has shape"):
        classes.summed_nll(h, weights, CLASSES, targets, jnp.ones((1, 1), bool))


def test_a_loss_of_nan_is_not_hidden() -> None:
    h, weights, targets = make(jnp.float32)
    nll = classes.nll(h.at[0].set(jnp.nan), weights, CLASSES, targets)
    assert np.all(np.isnan(nll[0]))
    assert np.all(np.isfinite(nll[1:]))


def test_work_does_not_grow_with_the_vocabulary() -> None:
    """Nothing in the loss and its gradients has a column, or a row of D numbers, per token."""
    vocab_size, num_classes, dim, positions = 20_000, 500, 64, 32
    of_token = np.arange(vocab_size, dtype=np.int32) % num_classes
    tokens = classes.arrange(of_token, num_classes)
    weights = classes.Weights(
        jnp.ones((8, 16, dim // 8)),
        classes.arrange_codes(jnp.zeros((vocab_size + num_classes, 8), jnp.int32), tokens, 16),
        jnp.ones(vocab_size + num_classes),
        jnp.zeros(vocab_size + num_classes),
    )

    def loss(h: Any, codebooks: Any, tokens: Any, targets: Any) -> Any:
        replaced = weights._replace(codebooks=codebooks)
        return jnp.sum(classes.nll(h, replaced, tokens, targets))

    h, targets = jnp.ones((positions, dim)), jnp.arange(positions)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(h, weights.codebooks, tokens, targets)
    temporary = compiled.compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * vocab_size * positions


def test_log_probabilities_of_many_codebooks_take_no_more_memory() -> None:
    """XLA held an array of V columns for each of them."""
    vocab_size, num_classes, num_codebooks, positions = 5000, 250, 16, 64
    tokens = classes.arrange(np.arange(vocab_size, dtype=np.int32) % num_classes, num_classes)
    shape = num_codebooks, 4, 2
    weights = make_weights(np.random.default_rng(0), tokens, shape, bias=True, scale=True)
    h = jnp.ones((positions, 2 * num_codebooks))
    compiled = jax.jit(classes.log_probs).lower(h, weights, tokens).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 6 * 4 * vocab_size * positions
