"""One optimizer step: microbatches, padding and the z-loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import random_state, tiny_config

from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model
from vqcx_jax.nn.loss import summed_nll
from vqcx_jax.sharding import make_mesh
from vqcx_jax.training.batches import to_microbatches
from vqcx_jax.training.setup import Setup, prepare
from vqcx_jax.training.state import TrainState, state_shardings
from vqcx_jax.training.step import make_train_step

# Its state after a step is that step's gradient.
GRADIENT = optax.trace(decay=0.0)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    directory = tmp_path_factory.mktemp("step")
    return prepare(tiny_config(directory, model__num_layers="1"), directory / "none", None)


def unequal_rows() -> dict[str, np.ndarray]:
    """Eight rows with 32, 27, ... tokens of one document, then padding; the last has none."""
    generator = np.random.default_rng(0)
    lengths = np.array([32, 27, 20, 13, 9, 5, 1, 0])[:, None]
    positions = np.arange(32)[None]
    is_token = positions < lengths
    ids = generator.integers(0, 256, (2, 8, 32))
    batch = {
        "inputs": ids[0] * is_token,
        "targets": ids[1] * is_token,
        "segment_ids": is_token,
        "positions": positions * is_token,
    }
    return {name: rows.astype(np.int32) for name, rows in batch.items()}


def one_step(
    setup: Setup, batch: dict[str, np.ndarray], num_microbatches: int = 1, z_loss: float = 0.0
) -> tuple[Any, dict[str, float]]:
    """The gradients and the metrics of the first step."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    model, rules = abstract_model(setup.config), setup.config.sharding
    graphdef, _, _ = functional.split(model)
    shardings = state_shardings(model, GRADIENT, mesh, rules)
    with jax.set_mesh(mesh):
        step = make_train_step(
            graphdef,
            GRADIENT,
            optax.constant_schedule(0.5),
            z_loss=z_loss,
            shardings=shardings,
        )
        state: TrainState = jax.device_put(random_state(setup, GRADIENT), shardings)
        microbatches = to_microbatches(batch, num_microbatches, mesh, rules)
        state, metrics = step(state, microbatches)
    assert int(state.step) == 1
    return state.opt_state.trace, {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def whole(setup: Setup) -> tuple[Any, dict[str, float]]:
    return one_step(setup, unequal_rows())


def test_metrics(whole: tuple[Any, dict[str, float]]) -> None:
    gradients, metrics = whole
    assert metrics["tokens"] == 32 + 27 + 20 + 13 + 9 + 5 + 1
    assert metrics["learning_rate"] == 0.5
    squares = [np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradients)]
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum(squares)), rtol=1e-6)


def test_gradient_is_that_of_the_mean_loss(
    setup: Setup, whole: tuple[Any, dict[str, float]]
) -> None:
    graphdef, _, _ = functional.split(abstract_model(setup.config))
    state = random_state(setup, GRADIENT)
    batch = jax.tree.map(jnp.asarray, unequal_rows())

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params: Any) -> jax.Array:
        loss, (_, tokens) = summed_nll(graphdef, params, state.buffers, batch)
        return loss / tokens

    loss, gradients = mean_loss(state.params)
    np.testing.assert_allclose(whole[1]["loss"], loss, rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), whole[0], gradients
    )


def test_microbatches_have_the_gradients_of_the_whole_batch(
    setup: Setup, whole: tuple[Any, dict[str, float]]
) -> None:
    gradients, metrics = one_step(setup, unequal_rows(), num_microbatches=4)
    assert metrics.keys() == whole[1].keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, whole[1][name], rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), gradients, whole[0]
    )


def test_padding_does_not_count(setup: Setup, whole: tuple[Any, dict[str, float]]) -> None:
    batch = unequal_rows()
    padding = batch["segment_ids"] == 0
    batch["inputs"][padding] = 7
    batch["targets"][padding] = 9
    gradients, metrics = one_step(setup, batch)
    np.testing.assert_allclose(metrics["loss"], whole[1]["loss"], rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), gradients, whole[0]
    )


def test_z_loss_is_in_the_objective_and_not_in_the_loss(
    setup: Setup, whole: tuple[Any, dict[str, float]]
) -> None:
    gradients, metrics = one_step(setup, unequal_rows(), z_loss=0.1)
    np.testing.assert_allclose(metrics["loss"], whole[1]["loss"], rtol=1e-6)
    assert metrics["grad_norm"] != pytest.approx(whole[1]["grad_norm"], rel=1e-3)
    # log Z grows with a bias of all tokens, the loss does not: its gradient sums to 0.
    np.testing.assert_allclose(np.sum(whole[0]["head"]["bias"]), 0.0, atol=1e-5)
    assert abs(np.sum(gradients["head"]["bias"])) > 1e-2
