"""Attention by cuDNN. It runs on NVIDIA GPUs alone: here JAX's plain form of the same call does."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_kinds import INPUTS, KINDS, POSITIONS, SEGMENTS, make_layer, with_random_parameters

from vqcx_jax.errors import UserError
from vqcx_jax.ops import attention, device, dispatch


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A device that says it is a GPU, without kernels; the options of every call of cuDNN."""
    calls: list[dict[str, Any]] = []
    plain = jax.nn.dot_product_attention

    def stand_in(*args: Any, **options: Any) -> jax.Array:
        if options.get("implementation") == "cudnn":
            calls.append(options)
            options = options | {"implementation": "xla"}
        return plain(*args, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA A100"))
    monkeypatch.setattr(dispatch, "_warned", set())
    return calls


def outputs(kind: str, implementation: str, is_packed: bool = True, **options: Any) -> Any:
    chosen: Any = dataclasses.replace(KINDS[kind], implementation=implementation, **options)  # type: ignore[arg-type]
    module = with_random_parameters(lambda: make_layer(chosen, dtype=jnp.bfloat16))
    info = module.encoding.info(jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))
    y, _ = module(jnp.asarray(INPUTS, jnp.bfloat16), info if is_packed else None)
    return np.asarray(y, np.float32)


@pytest.mark.filterwarnings("ignore:euler_turn")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("kind", ["complex", "rope", "nope", "pope"])
def test_equals_plain_jax(
    kind: str, is_packed: bool, window: int | None, gpu: list[dict[str, Any]]
) -> None:
    """A mask only where there are segments: a row that is one document has none."""
    expected = outputs(kind, "xla", is_packed, window=window)
    assert not gpu
    with dispatch.record() as traced:
        actual = outputs(kind, "auto", is_packed, window=window)
    assert ("Attention", "cudnn") in traced
    (options,) = gpu
    assert (options["mask"] is not None) == is_packed
    chex.assert_trees_all_close(actual, expected, rtol=0.02, atol=0.02)


REFUSED = {
    "float32": (jnp.float32, {}, "dtype=float32: cuDNN has bfloat16 and float16"),
    "soft_cap": (jnp.bfloat16, {"soft_cap": 5.0}, "soft_cap=5.0: cuDNN has none"),
}


@pytest.mark.parametrize("dtype, options, message", REFUSED.values(), ids=REFUSED)
def test_what_cudnn_does_not_have(dtype: Any, options: dict[str, Any], message: str) -> None:
    x = jnp.zeros((1, 4, 2, 8), dtype)
    with pytest.raises(dispatch.NotSupported, match=message):
        attention.attend_by_cudnn(x, x, x, None, scale=1.0, **options)


def test_values_wider_than_keys() -> None:
    x = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(dispatch.NotSupported, match="values: are 16 wide, and keys 8"):
        attention.attend_by_cudnn(x, x, jnp.tile(x, 2), None, scale=1.0)


def test_there_is_no_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name that is an error; else plain JAX runs, and a warning says why."""
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA A100"))
    monkeypatch.setattr(dispatch, "_warned", set())
    with (
        pytest.warns(UserWarning, match="Attention: not by cudnn: cuDNN: "),
        dispatch.record() as traced,
    ):
        outputs("rope", "auto")
    assert ("Attention", "xla") in traced
    with pytest.raises(UserError, match="implementation='cudnn': cuDNN: "):
        outputs("rope", "cudnn")


def test_alibi_has_slopes(gpu: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="implementation='cudnn': kind=alibi: cuDNN has no slopes"):
        outputs("alibi", "cudnn")
