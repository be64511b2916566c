"""Attention over a KV cache: the TPU kernel, in Pallas's interpreter of TPUs, against plain JAX.

What no query sees is NaN: neither scores nor values of it may count.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from versions import newest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops import device, dispatch, flash_decoding
from vqcx_jax.ops.flash_decoding import tpu, xla


class Case(NamedTuple):
    """One problem; `first` at the ends of blocks, of the cache, and between."""

    num_queries: int = 1
    num_heads: int = 4
    num_kv_heads: int = 2
    width: int = 128
    value_width: int = 128
    length: int = 200
    block: int = 64
    firsts: tuple[int, ...] = (0, 63, 130, 199)
    window: int | None = None
    soft_cap: float | None = None
    slopes: bool = False
    races: bool = False


CASES = {
    "one_token": Case(races=True, firsts=(0, 130, 199)),
    "three_tokens": Case(num_queries=3, firsts=(0, 62, 63, 64, 197)),
    "no_groups": Case(num_kv_heads=4, firsts=(64,)),
    "one_key_head": Case(num_kv_heads=1, num_queries=3, firsts=(126, 197)),
    "heads_of_three": Case(num_heads=6, num_kv_heads=3, firsts=(100,)),
    "width_64": Case(
        num_queries=3, width=64, value_width=64, length=300, block=128, firsts=(0, 126, 297)
    ),
    "width_32": Case(width=32, value_width=32, length=300, block=128, firsts=(128, 299)),
    "wide_keys": Case(width=128, value_width=64, length=300, block=128, firsts=(10, 280)),
    "width_256": Case(width=256, firsts=(70,)),
    "window": Case(window=50, num_queries=3, firsts=(0, 48, 111, 197)),
    "window_of_one": Case(window=1, firsts=(0, 64, 199)),
    "soft_cap": Case(soft_cap=2.0, firsts=(130,)),
    "slopes": Case(slopes=True, num_queries=3, firsts=(130,)),
    "everything": Case(
        num_queries=3,
        num_kv_heads=1,
        width=64,
        value_width=32,
        length=300,
        block=128,
        firsts=(250,),
        window=140,
        soft_cap=2.0,
        slopes=True,
    ),
    "sixteen_tokens": Case(num_queries=16, firsts=(50, 184)),
    "short_cache": Case(num_queries=3, length=5, block=128, firsts=(0, 2)),
}
FEW = ("one_token", "width_64")


def make(case: Case, dtype: Any) -> tuple[list[jax.Array], dict[str, Any]]:
    keys = iter(jax.random.split(jax.random.key(len(repr(case))), 3))

    def normal(length: int, num_heads: int, width: int) -> jax.Array:
        return jax.random.normal(next(keys), (2, length, num_heads, width)).astype(dtype)

    arrays = [
        2 * normal(case.num_queries, case.num_heads, case.width),
        normal(case.length, case.num_kv_heads, case.width),
        normal(case.length, case.num_kv_heads, case.value_width),
    ]
    options = {
        "scale": case.width**-0.5,
        "window": case.window,
        "soft_cap": case.soft_cap,
        "slopes": 2.0 ** -jnp.arange(1.0, case.num_heads + 1) if case.slopes else None,
    }
    return arrays, options


def of_layer(attend: Any, q: Any, k: Any, v: Any, first: Any, **options: Any) -> jax.Array:
    """The cache is the second layer's; the first one's is NaN."""
    k, v = (jnp.stack([jnp.full_like(x, jnp.nan), x]) for x in (k, v))
    return attend(q, k, v, 1, first, **options)


def kernel(case: Case, options: Any) -> Callable[..., jax.Array]:
    cores = 2 if case.races else 1
    interpret = pltpu.InterpretParams(detect_races=case.races, num_cores_or_threads=cores)
    options = options | {"block": case.block, "interpret": interpret}
    run = jax.jit(functools.partial(of_layer, tpu.attend, **options))
    # The interpreter waits for this thread, should it have begun with something else.
    return lambda *args: jax.block_until_ready(run(*args))


def definition(arrays: list[jax.Array], first: int, options: Any) -> np.ndarray:
    """In float32 throughout."""
    wide = (x.astype(jnp.float32) for x in arrays)
    with jax.default_matmul_precision("highest"):
        return np.asarray(of_layer(xla.attend, *wide, first, **options))


def unseen_are_nan(x_BxSxKxD: jax.Array, num_seen: int) -> jax.Array:
    return x_BxSxKxD.at[:, num_seen:].set(jnp.nan)


def relative(actual: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(actual, np.float32) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=newest_jax) for name in CASES]
)
def test_float32_is_the_definition(name: str) -> None:
    """And what lies past the last query does not matter."""
    case = CASES[name]
    (q, k, v), options = make(case, jnp.float32)
    run = kernel(case, options)
    for first in case.firsts:
        seen = first + case.num_queries
        actual = run(q, unseen_are_nan(k, seen), unseen_are_nan(v, seen), first)
        assert relative(actual, definition([q, k, v], first, options)) < 1e-5, first
        if case.races:
            assert not interpret_pallas_call.races.races_found


@newest_jax
@pytest.mark.parametrize("name", ["three_tokens", "width_64", "wide_keys", "everything"])
def test_bfloat16_is_near_the_definition(name: str) -> None:
    """As near as one rounding of weights and one of outputs leaves it."""
    case = CASES[name]
    (q, k, v), options = make(case, jnp.bfloat16)
    run = kernel(case, options)
    for first in case.firsts[-2:]:
        seen = first + case.num_queries
        actual = run(q, unseen_are_nan(k, seen), unseen_are_nan(v, seen), first)
        assert actual.dtype == jnp.bfloat16
        expected = definition([q, k, v], first, options)
        plain = relative(of_layer(xla.attend, q, k, v, first, **options), expected)
        assert relative(actual, expected) <= max(2 * plain, 2.0**-8)


@newest_jax
def test_gradients_are_those_of_plain_jax() -> None:
    case = CASES["everything"]
    arrays, options = make(case, jnp.float32)
    slopes = options.pop("slopes")

    def gradients(attend: Any, **more: Any) -> Any:
        def loss(q: Any, k: Any, v: Any, slopes: Any) -> jax.Array:
            return jnp.sum(
                jnp.sin(of_layer(attend, q, k, v, 250, slopes=slopes, **options, **more))
            )

        return jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arrays, slopes))

    actual = gradients(tpu.attend, block=128, interpret=pltpu.InterpretParams())
    for a, b in zip(actual, gradients(xla.attend), strict=True):
        assert relative(a, np.asarray(b)) < 1e-5


def test_only_what_is_needed_is_fetched() -> None:
    """Steps past the last block that is seen repeat it; those of a window begin at its first."""
    settings = tpu.Settings(1.0, None, None, 64, False)
    for first, window, expected in [
        (0, None, [0, 0, 0, 0]),
        (63, None, [0, 0, 0, 0]),
        (64, None, [0, 1, 1, 1]),
        (199, None, [0, 1, 2, 3]),
        (199, 50, [2, 3, 3, 3]),
        (191, 64, [2, 2, 2, 2]),
    ]:
        bounds = tpu._bounds(settings._replace(window=window), jnp.int32(first), 1, 200, 64)
        assert [int(tpu._block((0, first, *bounds), step)) for step in range(4)] == expected


@pytest.mark.parametrize("num_queries", [1, 17])
def test_a_long_prompt_goes_by_plain_jax(num_queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a warning, for it is nothing unusual."""
    monkeypatch.setattr(device, "current", lambda: device.Device("tpu", "TPU v5"))
    q, cache = jnp.ones((1, num_queries, 2, 16)), jnp.ones((1, 128, 1, 16))
    with dispatch.record() as traced, pltpu.force_tpu_interpret_mode():
        y = np.asarray(flash_decoding.attend(q, cache, cache, 5, scale=1.0))
    np.testing.assert_allclose(y, 1.0, rtol=1e-6)
    taken = "pallas_tpu" if num_queries == 1 else "xla"
    assert traced == [("flash_decoding.attend", taken)]
    if num_queries > 1:
        with pytest.raises(UserError, match="q: has 17 positions, must have at most 16"):
            flash_decoding.attend(q, cache, cache, 5, scale=1.0, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 100, 2, 64)}, "k, v: have 100 and 128 positions"),
        ({"q": (1, 129, 4, 64)}, "k: has 128 positions, must have the 129 of q or more"),
        ({"k": (1, 128, 3, 64)}, "k, v: have 3 and 2 heads"),
        ({"k": (1, 128, 2, 32)}, "k: is 32 wide, must be as wide as q, 64"),
        ({"window": 0}, "window=0: must be at least 1"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {name: jnp.zeros((1, 128, 2, 64)) for name in ("k", "v")}
    arguments["q"] = jnp.zeros((1, 1, 4, 64))
    arguments |= {name: jnp.zeros(x) if isinstance(x, tuple) else x for name, x in change.items()}
    with pytest.raises(UserError, match=message):
        flash_decoding.attend(**arguments, first=0, scale=1.0)


@pytest.mark.parametrize(
    ("q", "v", "dtype", "message"),
    [
        ((1, 1, 4, 40), (1, 128, 2, 64), "float32", "q: is 40 wide, must be a multiple of 16"),
        ((1, 16, 64, 64), (1, 128, 2, 64), "float32", "16 positions of 64 heads, must have at"),
        ((1, 1, 4, 64), (1, 128, 2, 64), "float16", "are float16, float32, must all be bfloat16"),
    ],
)
def test_what_it_cannot_do(
    q: tuple[int, ...], v: tuple[int, ...], dtype: str, message: str
) -> None:
    k = jnp.zeros((1, 128, 2, q[-1]))
    with pytest.raises(dispatch.NotSupported, match=message):
        of_layer(tpu.attend, jnp.zeros(q), k, jnp.zeros(v, dtype), 0, scale=1.0)
