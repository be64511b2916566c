"""V logits from code logits, by every implementation, against the formula in float64."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from versions import newest_jax

from vqcx_jax.ops import dispatch
from vqcx_jax.ops.codebook import scatter
from vqcx_jax.ops.codebook.scatter import tpu, xla
from vqcx_jax.ops.codebook.tpu_tiles import Tile

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "xla": xla.logits,
    "pallas_tpu": functools.partial(
        tpu.logits, tile=Tile(32, 128, 16), interpret=pltpu.InterpretParams()
    ),
}
# N, V, K_m: ragged in every direction, and several tiles.
SHAPES = {
    "tiny": ((), 7, (3,)),
    "ragged": ((5, 9), 300, (7, 20, 13)),
    "even": ((64,), 256, (16,) * 2),
    "many_codebooks": ((5, 2), 300, (7,) * 8),
}
OPTIONS = {"plain": (False, False, None), "all": (True, True, 5.0), "bias": (True, False, None)}


def make(shape: str, options: str) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    leading, vocab_size, num_codes = SHAPES[shape]
    has_bias, has_scale, _ = OPTIONS[options]
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
    return (
        tuple(2.0 * normal(*leading, k) for k in num_codes),
        np.stack([rng.integers(k, size=vocab_size) for k in num_codes], axis=1),
        normal(vocab_size) if has_bias else None,
        normal(vocab_size) if has_scale else None,
        normal(*leading, vocab_size),
    )


def formula(code_logits: Any, assignment: Any, bias: Any, scale: Any, *, soft_cap: Any) -> Any:
    z = sum(l[..., assignment[:, m]] for m, l in enumerate(code_logits))
    z = z if scale is None else z * scale
    z = z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)
    return z if bias is None else z + bias


def values_and_gradients(logits: Callable[..., Any], assignment: Any, **options: Any) -> Any:
    def function(code_logits: Any, bias: Any, scale: Any, g: Any) -> Any:
        z, vjp = jax.vjp(
            lambda l, b, s: logits(l, assignment, b, s, **options), code_logits, bias, scale
        )
        return z, vjp(g.astype(z.dtype))

    return function


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "shape", ["ragged", *(pytest.param(shape, marks=newest_jax) for shape in ("tiny", "even"))]
)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equals_formula(
    name: str, shape: str, options: str, in_float64: Any, max_error: Any
) -> None:
    code_logits, assignment, bias, scale, g = make(shape, options)
    cap = OPTIONS[options][2]
    arrays = (code_logits, bias, scale, g)
    of_formula = values_and_gradients(formula, assignment, soft_cap=cap)
    expected = in_float64(of_formula, *arrays)
    function = values_and_gradients(IMPLEMENTATIONS[name], jnp.asarray(assignment), soft_cap=cap)
    actual = jax.jit(function)(*arrays)
    chex.assert_trees_all_equal_shapes(actual, expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert max_error(a, e) <= 1e-5


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_result(name: str) -> None:
    """One rounding of the float32 result, and float32 gradients of its rounded cotangent."""
    code_logits, assignment, bias, scale, g = make("ragged", "all")
    logits = IMPLEMENTATIONS[name]
    assignment = jnp.asarray(assignment)
    wide, narrow = (
        values_and_gradients(logits, assignment, soft_cap=5.0, dtype=dtype)(
            code_logits, bias, scale, g.astype(jnp.bfloat16)
        )
        for dtype in ("float32", "bfloat16")
    )
    assert narrow[0].dtype == jnp.bfloat16
    chex.assert_trees_all_close(narrow[0].astype(jnp.float32), wide[0], rtol=2.0**-8)
    chex.assert_trees_all_close(narrow[1], wide[1], rtol=1e-5, atol=1e-5)


def test_bfloat16_products() -> None:
    """Code logits are rounded once, and nothing else is."""
    code_logits, assignment, bias, scale, _ = make("ragged", "all")
    assignment = jnp.asarray(assignment)
    rounded = tuple(l.astype(jnp.bfloat16).astype(jnp.float32) for l in code_logits)
    actual = IMPLEMENTATIONS["pallas_tpu"](
        code_logits, assignment, bias, scale, product_dtype="bfloat16"
    )
    expected = xla.logits(rounded, assignment, bias, scale)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_no_race_between_cores() -> None:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    code_logits, assignment, bias, scale, g = make("even", "all")
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    logits = functools.partial(tpu.logits, tile=Tile(32, 128, 16), interpret=params)
    values_and_gradients(logits, jnp.asarray(assignment))(code_logits, bias, scale, g)
    assert not interpret_pallas_call.races.races_found


def test_plain_jax_on_a_cpu() -> None:
    code_logits, assignment, *_ = make("tiny", "plain")
    with dispatch.record() as traced:
        scatter.logits(code_logits, jnp.asarray(assignment))
    assert traced == [("codebook.scatter.logits", "xla")]
