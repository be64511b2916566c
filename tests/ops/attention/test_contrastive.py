"""The phase-contrastive loss against its formula, its limits and its gradients."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.errors import UserError
from vqcx_jax.ops.attention import phase_contrastive_loss, rotate

KEY = jax.random.key(3)


def inputs(dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, 5, 2, 6)).astype(dtype)


def literal(x: Any, drop_rate: float, temperature: float, valid: Any) -> float:
    """The formula of the module, row by row, with atan2 and the masks of the same keys."""
    x = np.asarray(x, np.float64)
    theta = np.arctan2(x[..., 3:], x[..., :3])
    masks = [
        np.asarray(jax.random.bernoulli(half, 1 - drop_rate, theta.shape))
        for half in jax.random.split(KEY)
    ]
    losses = []
    for b, n in np.ndindex(x.shape[:2]):
        if not valid[b, n]:
            continue
        similar = {}
        for j in range(x.shape[1]):
            if valid[b, j]:
                first, second = masks[0][b, n], masks[1][b, j]
                product = np.sum(first * second * np.cos(theta[b, n] - theta[b, j]))
                similar[j] = product / np.sqrt(first.sum() * second.sum()) / temperature
        losses.append(np.log(np.sum(np.exp(list(similar.values())))) - similar[n])
    return float(np.mean(losses))


@pytest.mark.parametrize(("drop_rate", "temperature"), [(0.0, 1.0), (0.3, 0.2)])
@pytest.mark.parametrize("padded", [False, True])
def test_is_the_formula(drop_rate: float, temperature: float, padded: bool) -> None:
    valid = np.ones((2, 5), bool)
    if padded:
        valid[1, 2:] = False
    actual = phase_contrastive_loss(
        inputs(),
        KEY,
        drop_rate=drop_rate,
        temperature=temperature,
        valid=jnp.asarray(valid) if padded else None,
    )
    assert actual.dtype == jnp.float32
    # The smoothing of small planes: 1e-6 of ordinary ones.
    assert float(actual) == pytest.approx(
        literal(inputs(), drop_rate, temperature, valid), rel=1e-4
    )


def loss(x: jax.Array, **options: Any) -> jax.Array:
    return phase_contrastive_loss(x, KEY, **{"drop_rate": 0.2, "temperature": 0.5} | options)


def test_same_phases_cannot_be_told_apart() -> None:
    same = jnp.broadcast_to(inputs()[:, :1], (2, 5, 2, 6))
    assert float(loss(same, drop_rate=0.0)) == pytest.approx(np.log(5), rel=1e-5)
    assert float(loss(inputs())) < np.log(5)


def test_only_differences_of_phases_count() -> None:
    """No branch cut: phases turned together, and amplitudes, change nothing."""
    x = inputs() + jnp.sign(inputs())
    angle = jnp.asarray([2.0, 3.0, -1.0])
    turned = rotate(x, jnp.cos(angle)[None], jnp.sin(angle)[None])
    chex.assert_trees_all_close(loss(turned), loss(x), rtol=1e-5)
    chex.assert_trees_all_close(loss(7 * x), loss(x), rtol=1e-5)


value_and_gradient = jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_finite(dtype: Any) -> None:
    valid = jnp.asarray([[True] * 5, [False] * 5])
    for value in (0.0, -0.0, 1e-40, 1e-3):
        x = inputs(dtype).at[0].set(value)
        for mask in (valid, ~valid, valid | ~valid, valid & ~valid):
            result = value_and_gradient(x, valid=mask)
            chex.assert_tree_all_finite(result)
            np.testing.assert_array_equal(result[1][~mask], 0.0)
    assert float(result[0]) == 0.0


@pytest.mark.parametrize("options", [{"drop_rate": 1.0}, {"drop_rate": -0.5}, {"temperature": 0.0}])
def test_out_of_range(options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"{name}={value}: must be"):
        phase_contrastive_loss(inputs(), KEY, **{"drop_rate": 0.2, "temperature": 0.1} | options)
