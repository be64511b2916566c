"""The Hopper kernel of the streamed loss, interpreted, against the definition."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from versions import newest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops import device, dispatch
from vqcx_jax.ops.codebook import streaming
from vqcx_jax.ops.codebook.streaming import mosaic_gpu, reference
from vqcx_jax.ops.codebook.streaming.gpu_block_sizes import BlockSizes, Tile

kernel = functools.partial(streaming.log_z, implementation="mosaic_gpu", product_dtype="bfloat16")


class Case(NamedTuple):
    """Code logits of shape `leading` for codebooks of so many codes."""

    leading: tuple[int, ...]
    num_codes: tuple[int, ...]
    vocab_size: int
    has_scale: bool = True
    banned: int = 0  # So many first tokens have a bias of -inf.


CASES = {
    "ragged": Case((5, 14), (7, 20, 13), 300),
    "several_blocks": Case((150,), (40, 50), 200, has_scale=False),
    "banned": Case((3,), (16,) * 4, 400, banned=260),
}


def make(case: Case) -> tuple[Any, Any, jax.Array]:
    """Arrays with gradients, codes, cotangents. Times log2 e, code logits are bfloat16 numbers."""
    rng = np.random.default_rng(0)
    rounded = [
        jnp.asarray(rng.standard_normal((*case.leading, n)), jnp.bfloat16) for n in case.num_codes
    ]
    code_logits = tuple(x.astype(jnp.float32) / math.log2(math.e) for x in rounded)
    codes = np.stack([rng.integers(n, size=case.vocab_size) for n in case.num_codes], axis=1)
    bias = rng.standard_normal(case.vocab_size)
    bias[: case.banned] = -np.inf
    scale = jnp.asarray(1 + 0.2 * rng.standard_normal(case.vocab_size), jnp.float32)
    arrays = (code_logits, jnp.asarray(bias, jnp.float32), scale if case.has_scale else None)
    return arrays, jnp.asarray(codes), jnp.asarray(rng.standard_normal(case.leading), jnp.float32)


def values_and_gradients(function: Any, arrays: Any, codes: Any, cotangents: Any) -> Any:
    def log_z(code_logits: Any, bias: Any, scale: Any) -> Any:
        return function(code_logits, codes, bias, scale)

    result, pull_back = jax.vjp(log_z, *arrays)
    return result, pull_back(cotangents)


@newest_jax
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_definition(case: Case, hopper: None, in_float64: Any, max_error: Any) -> None:
    """What is rounded to bfloat16 are gradients by token logits, for those by code logits."""
    args = make(case)
    log_z, gradients = values_and_gradients(kernel, *args)
    expected = in_float64(functools.partial(values_and_gradients, reference.log_z), *args)
    np.testing.assert_allclose(log_z, expected[0], rtol=1e-5, atol=1e-5)
    for actual, true in zip(gradients[0], expected[1][0], strict=True):
        assert max_error(actual, true) <= 2.0**-8
    for actual, true in zip(gradients[1:], expected[1][1:], strict=True):
        assert actual is None or max_error(actual, true) <= 1e-5


@newest_jax
def test_other_tiles(
    hopper: None, in_float64: Any, max_error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass has its own, of which neither is a multiple of the other."""
    used, tiles = [], mosaic_gpu._tiles
    monkeypatch.setattr(mosaic_gpu, "_tiles", lambda *a: used.append(tiles(*a)) or used[-1])
    args = make(CASES["several_blocks"])
    other = functools.partial(
        mosaic_gpu.log_z, product_dtype="bfloat16", blocks=BlockSizes(Tile(128, 3), Tile(192, 2))
    )
    log_z, gradients = values_and_gradients(other, *args)
    expected = in_float64(functools.partial(values_and_gradients, reference.log_z), *args)
    np.testing.assert_allclose(log_z, expected[0], rtol=1e-5, atol=1e-5)
    for actual, true in zip(gradients[0], expected[1][0], strict=True):
        assert max_error(actual, true) <= 2.0**-8
    assert max_error(gradients[1], expected[1][1]) <= 1e-5
    assert [(tile.size, tile.stages) for tile in used] == [(128, 3), (192, 2)]


@newest_jax
@pytest.mark.parametrize(
    ("blocks", "error"),
    [
        (BlockSizes(forward=Tile(32, 2)), "tokens=32 of the forward tile: must be a multiple of"),
        (BlockSizes(backward=Tile(320, 2)), "tokens=320 of the backward tile: must be"),
        (BlockSizes(forward=Tile(64, 1)), "stages=1 of the forward tile: must be at least 2"),
    ],
)
def test_tiles_that_cannot_be(hopper: None, blocks: BlockSizes, error: str) -> None:
    arrays, codes, _ = make(CASES["ragged"])
    with pytest.raises(UserError, match=error):
        mosaic_gpu.log_z(arrays[0], codes, product_dtype="bfloat16", blocks=blocks)


@newest_jax
def test_what_it_cannot_do(hopper: None) -> None:
    arrays, codes, _ = make(CASES["ragged"])
    with pytest.raises(UserError, match="product_dtype=float32: must be bfloat16"):
        streaming.log_z(arrays[0], codes, implementation="mosaic_gpu")
    wide = (jnp.zeros((3, 200)), jnp.zeros((3, 100)))
    with pytest.raises(UserError, match="300 code logits: at most 256"):
        kernel(wide, jnp.zeros((7, 2), jnp.int32))


def test_it_is_not_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H100 80GB HBM3"))
    arrays, codes, _ = make(CASES["ragged"])
    with dispatch.record() as traced:
        streaming.log_z(arrays[0], codes, product_dtype="bfloat16")
    assert traced == [("codebook.streaming.log_z", "xla")]
