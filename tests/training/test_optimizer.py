from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqcx_jax.config.schema import Optimizer
from vqcx_jax.nn.functional import Tree
from vqcx_jax.training.optimizer import make_optimizer, make_schedule


def rates(steps: int, at: list[int], **options: Any) -> list[float]:
    config = Optimizer(learning_rate=1.0, final_fraction=0.1, **options)
    schedule = make_schedule(config, steps)
    return [float(schedule(step)) for step in at]


def test_warmup_is_linear_from_zero_to_the_peak() -> None:
    for schedule in ("cosine", "wsd", "constant"):
        got = rates(100, [0, 1, 5, 10], schedule=schedule, warmup_steps=10)
        np.testing.assert_allclose(got, [0.0, 0.1, 0.5, 1.0], rtol=1e-6)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    for schedule in ("cosine", "wsd", "constant"):
        assert rates(100, [0], schedule=schedule, warmup_steps=0) == [1.0]


def test_cosine_falls_to_the_final_fraction() -> None:
    got = rates(110, [10, 60, 110, 200], schedule="cosine", warmup_steps=10)
    np.testing.assert_allclose(got, [1.0, 0.55, 0.1, 0.1], rtol=1e-6)
    (quarter,) = rates(110, [35], schedule="cosine", warmup_steps=10)
    np.testing.assert_allclose(quarter, 0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2, rtol=1e-6)


def test_wsd_is_stable_and_then_falls_linearly() -> None:
    at = [10, 50, 79, 80, 90, 100, 150]
    got = rates(100, at, schedule="wsd", warmup_steps=10, decay_fraction=0.2)
    np.testing.assert_allclose(got, [1.0, 1.0, 1.0, 1.0, 0.55, 0.1, 0.1], rtol=1e-6)


def test_wsd_may_decay_right_after_the_warmup() -> None:
    got = rates(10, [0, 5, 10], schedule="wsd", warmup_steps=5, decay_fraction=0.5)
    np.testing.assert_allclose(got, [0.0, 1.0, 0.1], rtol=1e-6)


def test_constant_stays() -> None:
    assert rates(100, [10, 99, 1000], schedule="constant", warmup_steps=10) == [1.0, 1.0, 1.0]


PARAMS = {"matrix": jnp.full((2, 2), 2.0), "scale": jnp.full((2,), 2.0)}
MASK: Tree = {"matrix": True, "scale": False}


def update(gradient: Tree, **options: Any) -> Tree:
    config = Optimizer(learning_rate=0.5, schedule="constant", warmup_steps=0, **options)
    optimizer = make_optimizer(config, make_schedule(config, 10), MASK)
    updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates)


def test_only_masked_weights_decay() -> None:
    zero = {name: jnp.zeros_like(value) for name, value in PARAMS.items()}
    params = update(zero, weight_decay=0.1)
    np.testing.assert_allclose(params["matrix"], 2.0 * (1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(params["scale"], 2.0)


def test_first_step_of_adam_by_hand() -> None:
    """Bias correction makes the first update learning_rate * g / (|g| + epsilon)."""
    gradient = {"matrix": jnp.full((2, 2), 3.0), "scale": jnp.full((2,), -0.25)}
    params = update(gradient, weight_decay=0.0, clip_norm=None, epsilon=0.25)
    np.testing.assert_allclose(params["matrix"], 2.0 - 0.5 * 3.0 / 3.25, rtol=1e-5)
    np.testing.assert_allclose(params["scale"], 2.0 + 0.5 * 0.25 / 0.5, rtol=1e-5)


@pytest.mark.parametrize(("size", "clipped"), [(10.0, 0.5), (0.1, 0.1)])
def test_clipping_is_by_the_global_norm(size: float, clipped: float) -> None:
    gradient = {
        "matrix": jnp.zeros((2, 2)).at[0, 0].set(0.6 * size),
        "scale": jnp.zeros((2,)).at[0].set(0.8 * size),
    }
    params = update(gradient, weight_decay=0.0, clip_norm=0.5, epsilon=1.0)
    for name, share in (("matrix", 0.6), ("scale", 0.8)):
        g = share * clipped
        np.testing.assert_allclose(
            params[name].ravel()[0], 2.0 - 0.5 * g / (g + 1.0), rtol=1e-5, err_msg=name
        )
