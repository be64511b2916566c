"""The attention layer by TPU kernels, in Pallas's interpreter, against the layer in plain JAX."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_kinds import (
    INPUTS,
    KINDS,
    POSITIONS,
    SEGMENTS,
    VOCAB_SIZE,
    make_layer,
    with_random_parameters,
)
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from versions import newest_jax, oldest_jax

from vqcx_jax.config import schema
from vqcx_jax.errors import UserError
from vqcx_jax.nn import KVCache, Transformer, functional
from vqcx_jax.nn.layers import HIDDEN, ROWS
from vqcx_jax.ops import device, dispatch
from vqcx_jax.sharding import constrain, make_mesh

WITH_KERNELS = (
    "complex",
    "complex_learned",
    "complex_window_soft_cap",
    "amplitude_linear",
    "eulerformer",
    "eulerformer_planes_ntk",
    "rope_learned_yarn",
    "pope_0.75_per_head_learned_ntk",
)
# Kernels do not turn these: they are given encoded queries and keys.
ENCODED = ("harmonic3_per_head", "nope", "smooth")
# Of each kernel and option one kind; tests of operations have the others.
EQUAL = (
    "complex",
    "complex_window_soft_cap",
    "eulerformer_planes_ntk",
    "rope_learned_yarn",
    "pope_0.75_per_head_learned_ntk",
    "harmonic3_per_head",
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

    # Not the loss itself: its terms all but cancel, in another order on every machine.
    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    return jax.tree.map(np.asarray, run(params, jnp.asarray(INPUTS)))


@pytest.mark.parametrize("kind", (*WITH_KERNELS, *ENCODED))
def test_runs_by_kernels(kind: str, tpu: None) -> None:
    by_kernels = layer(kind, "auto")
    assert (by_kernels.encoding.phases() is None) == (kind in ENCODED)
    with dispatch.record() as traced:
        jax.eval_shape(by_kernels, jnp.asarray(INPUTS))
    assert ("Attention", "pallas_tpu") in traced and ("Attention", "xla") not in traced


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("complex", marks=oldest_jax),
        *(pytest.param(kind, marks=newest_jax) for kind in EQUAL[1:]),
    ],
)
def test_equals_plain_jax(kind: str, tpu: None) -> None:
    expected, actual = (results(layer(kind, name)) for name in ("xla", "auto"))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


@newest_jax
@pytest.mark.parametrize("kind", ["complex", "pope"])
def test_a_row_that_is_one_document(kind: str, tpu: None) -> None:
    expected, _ = layer(kind, "xla")(jnp.asarray(INPUTS))
    actual, _ = layer(kind, "pallas_tpu")(jnp.asarray(INPUTS))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "axis_type"),
    [
        pytest.param("complex_learned", "explicit", marks=oldest_jax),
        pytest.param("pope_0.75_per_head_learned_ntk", "auto", marks=newest_jax),
    ],
)
def test_sharded_over_rows_and_heads(kind: str, axis_type: str, tpu: None) -> None:
    """Each device has its row and its heads, and gradients of what all share are summed."""
    expected = results(layer(kind, "pallas_tpu"))
    mesh = make_mesh({"data": 2, "tensor": 2}, axis_type, jax.devices()[:4])
    with jax.set_mesh(mesh):
        actual = results(layer(kind, "pallas_tpu"), mesh)
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


def decoded(module: Any) -> np.ndarray:
    """INPUTS, some tokens at a time, with a cache in which nothing else is a number."""
    key_width = module.encoding.key_width
    cache = KVCache(*(jnp.full((2, 12, 2, width), jnp.nan) for width in (key_width, 16)))
    outputs, start = [], 0
    for size in (4, 1, 1, 3):
        x = jnp.asarray(INPUTS[:, start : start + size])
        y, cache = jax.block_until_ready(step(module, x, None, cache, start))
        outputs.append(y)
        start += size
    return np.concatenate(outputs, axis=1)


def of_cache(traced: list[tuple[str, str]]) -> set[str]:
    return {name for operation, name in traced if operation == "flash_decoding.attend"}


@nnx.jit
def step(module: Any, *args: Any) -> Any:
    return module(*args)


@pytest.mark.parametrize(
    "kind",
    [
        "complex",
        *(pytest.param(kind, marks=newest_jax) for kind in ("harmonic2", "alibi_window")),
    ],
)
def test_decoding_equals_all_at_once(kind: str, tpu: None) -> None:
    """Every kind decodes by the kernel, whatever it is trained by."""
    expected, _ = layer(kind, "xla")(jnp.asarray(INPUTS))
    with dispatch.record() as traced:
        actual = decoded(layer(kind, "auto"))
    assert of_cache(traced) == {"pallas_tpu"}
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "axis_type",
    [pytest.param("explicit", marks=oldest_jax), pytest.param("auto", marks=newest_jax)],
)
def test_model_decodes_sharded_over_rows_and_heads(axis_type: str, tpu: None) -> None:
    """Each device has its rows and key heads of the cache, of all layers."""
    config = schema.Model(
        vocab_size=VOCAB_SIZE,
        embed_dim=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=24,
        attention=schema.ComplexAttention(),
        head=schema.FullHead(),
        dtype="float32",
    )
    model = with_random_parameters(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, params, buffers = functional.split(model)
    tokens = jnp.arange(12).reshape(2, 6)
    expected = jax.jit(Transformer.hidden)(model, tokens)
    mesh = make_mesh({"data": 2, "tensor": 2}, axis_type, jax.devices()[:4])
    with jax.set_mesh(mesh), dispatch.record() as traced:
        layout = functional.shardings(model, mesh, model.rules)
        params, buffers = jax.device_put((params, buffers), layout)
        extend = jax.jit(lambda *args: nnx.merge(graphdef, params, buffers).extend(*args))
        cache, outputs = model.empty_cache(2, 7), []
        for start, end in ((0, 4), (4, 5), (5, 6)):
            piece = constrain(tokens[:, start:end], ROWS, model.rules)
            h, cache = jax.block_until_ready(extend(piece, cache, start))
            outputs.append(np.asarray(h))
    assert of_cache(traced) == {"pallas_tpu"}
    np.testing.assert_allclose(np.concatenate(outputs, 1), expected, rtol=1e-4, atol=1e-4)


def test_implementation_of_a_cached_step(tpu: None) -> None:
    """The kernel has few tokens: a prompt of more goes by plain JAX, and so do steps of cuDNN's."""
    x = jnp.ones((2, 17, 16))

    def taken(implementation: str, num_tokens: int) -> str:
        module = layer("complex", implementation)
        cache = KVCache(*(jnp.zeros((2, 20, 2, 16)) for _ in range(2)))
        with dispatch.record() as traced:
            jax.eval_shape(lambda x: module(x, None, cache, 0), x[:, :num_tokens])
        (name,) = of_cache(traced)
        return name

    names = ("auto", "xla", "pallas_tpu", "cudnn")
    short = {name: taken(name, 16) for name in names}
    assert short == {"auto": "pallas_tpu", "xla": "xla", "pallas_tpu": "pallas_tpu", "cudnn": "xla"}
    assert {taken(name, 17) for name in names} == {"xla"}
