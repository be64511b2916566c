"""The attention layer by TPU kernels, in Pallas's interpreter, against the layer in plain JAX."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_kinds import INPUTS, KINDS, POSITIONS, SEGMENTS, make_layer, with_random_parameters
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from versions import newest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.nn import functional
from vqcx_jax.nn.layers import HIDDEN, ROWS
from vqcx_jax.ops import device, dispatch
from vqcx_jax.sharding import constrain, make_mesh

WITH_KERNELS = (
    "complex",
    "complex_learned",
    "complex_window_soft_cap",
    "eulerformer",
    "eulerformer_planes_ntk",
    "rope_learned_yarn",
    # Kernels do not turn these: they are given encoded queries and keys.
    "harmonic3_per_head",
    "nope",
    "pope",
    "smooth",
)


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device that says it is a TPU, and kernels that are interpreted."""
    monkeypatch.setattr(device, "current", lambda: device.Device("tpu", "TPU v5"))
    monkeypatch.setattr(dispatch, "_warned", set())
    with pltpu.force_tpu_interpret_mode():
        yield


def layer(kind: str, implementation: str) -> Any:
    options: Any = dataclasses.replace(KINDS[kind], implementation=implementation)  # type: ignore[arg-type]
    return with_random_parameters(lambda: make_layer(options, head_dim=16))


def results(module: Any, mesh: Any = None) -> Any:
    """Outputs, and gradients by inputs and every trained array."""
    graphdef, params, buffers = functional.split(module)
    if mesh is not None:
        layout = functional.shardings(module, mesh, module.rules)
        params, buffers = jax.device_put((params, buffers), layout)

    def loss(params: Any, x: jax.Array) -> Any:
        module = nnx.merge(graphdef, params, buffers)
        rows = (constrain(ids, ROWS, module.rules) for ids in (SEGMENTS, POSITIONS))
        y, _ = module(constrain(x, HIDDEN, module.rules), module.encoding.info(*rows))
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    return jax.tree.map(np.asarray, run(params, jnp.asarray(INPUTS)))


@pytest.mark.parametrize(
    "kind", ["complex", *(pytest.param(kind, marks=newest_jax) for kind in WITH_KERNELS[1:])]
)
def test_equals_plain_jax(kind: str, tpu: None) -> None:
    expected = results(layer(kind, "xla"))
    with dispatch.record() as traced:
        actual = results(layer(kind, "auto"))
    assert ("Attention", "pallas_tpu") in traced and ("Attention", "xla") not in traced
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis_type", ["explicit", pytest.param("auto", marks=newest_jax)])
def test_sharded_over_rows_and_heads(axis_type: str, tpu: None) -> None:
    """Each device has its row and its heads, and gradients of what all share are summed."""
    expected = results(layer("complex_learned", "pallas_tpu"))
    mesh = make_mesh({"data": 2, "tensor": 2}, axis_type, jax.devices()[:4])
    with jax.set_mesh(mesh):
        actual = results(layer("complex_learned", "pallas_tpu"), mesh)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= 4e-6 * np.abs(b).max()  # Sums are taken in another order.


def test_slopes(tpu: None) -> None:
    """No kernel has them. Asked for by name that is an error; else a warning says so."""
    with pytest.raises(UserError, match="implementation='pallas_tpu': kind=alibi: kernels have no"):
        results(layer("alibi", "pallas_tpu"))
    with (
        pytest.warns(UserWarning, match="Attention: not by pallas_tpu: kind=alibi"),
        dispatch.record() as traced,
    ):
        results(layer("alibi", "auto"))
    assert ("Attention", "xla") in traced and ("Attention", "pallas_tpu") not in traced


def test_on_a_cpu() -> None:
    with dispatch.record() as traced:
        results(layer("complex", "auto"))
    assert ("Attention", "xla") in traced and ("Attention", "pallas_tpu") not in traced
    with pytest.raises(UserError, match="implementation='pallas_tpu': needs a tpu"):
        results(layer("complex", "pallas_tpu"))
