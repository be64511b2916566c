"""The best tokens and log Z in one pass, by every implementation, against V logits."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from versions import newest_jax, oldest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops import dispatch
from vqcx_jax.ops.codebook import loss, multi, streaming
from vqcx_jax.ops.codebook.streaming import tpu, xla
from vqcx_jax.ops.codebook.tpu_tiles import Tile
from vqcx_jax.ops.dispatch import NotSupported

INTERPRETED = {"tile": Tile(16, 256, 16), "interpret": pltpu.InterpretParams()}
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "xla": xla.top_k,
    "pallas_tpu": functools.partial(tpu.top_k, **INTERPRETED),
}
# Leading axes of code logits, V, K_m.
SHAPES = {
    "tiny": ((), 7, (3,)),
    "ragged": ((5, 9), 1009, (7, 20, 13)),
    "many_codebooks": ((3,), 300, (4,) * 16),
}


def make(shape: str, whole_numbers: bool) -> dict[str, Any]:
    """Whole numbers make many ties without any rounding."""
    leading, vocab_size, num_codes = SHAPES[shape]
    rng = np.random.default_rng(0)
    rounded = (lambda x: np.round(x) + 0.0) if whole_numbers else np.asarray  # No -0.0.
    normal = lambda *size: jnp.asarray(rounded(2 * rng.standard_normal(size)), jnp.float32)  # noqa: E731
    codes = [rng.integers(k, size=vocab_size) for k in num_codes]
    return {
        "code_logits": tuple(normal(*leading, k) for k in num_codes),
        "assignment": jnp.asarray(np.stack(codes, axis=1), jnp.int32),
        "bias": normal(vocab_size),
        "scale": normal(vocab_size),
    }


def check(actual: Any, z: jax.Array, k: int, *, exact: bool) -> None:
    """Of V logits: the k largest, of equals the lowest token, and log Z."""
    listed, tokens, log_z = actual
    expected_z, expected_tokens = jax.lax.top_k(z + 0.0, k)  # It puts -0.0 behind 0.0.
    np.testing.assert_allclose(listed, expected_z, rtol=0 if exact else 1e-5, atol=1e-5)
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_allclose(log_z, jax.nn.logsumexp(z, axis=-1), rtol=1e-5, atol=1e-5)
    assert tokens.dtype == jnp.int32 and listed.dtype == log_z.dtype == jnp.float32


@oldest_jax
@pytest.mark.parametrize("whole_numbers", [True, False])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_those_of_the_v_logits(shape: str, name: str, whole_numbers: bool) -> None:
    inputs = make(shape, whole_numbers)
    z = multi.logits(**inputs)
    # All of them, and fewer than a group has, too.
    for k in sorted({1, min(50, z.shape[-1]), z.shape[-1]}):
        actual = jax.jit(IMPLEMENTATIONS[name], static_argnames="k")(**inputs, k=k)
        check(actual, z, k, exact=whole_numbers)


@oldest_jax
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_all_equal(name: str) -> None:
    """As in a model that has not been trained: the lowest ids."""
    inputs = make("ragged", whole_numbers=True)
    inputs["code_logits"] = tuple(map(jnp.zeros_like, inputs["code_logits"]))
    inputs["bias"] = inputs["scale"] = None
    _, tokens, _ = IMPLEMENTATIONS[name](**inputs, k=130)
    np.testing.assert_array_equal(tokens, np.broadcast_to(np.arange(130), tokens.shape))


@oldest_jax
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_impossible_tokens_come_last(name: str) -> None:
    inputs = make("ragged", whole_numbers=True)
    inputs["bias"] = jnp.where(jnp.arange(1009) % 300 == 0, inputs["bias"], -jnp.inf)
    z = multi.logits(**inputs)
    check(IMPLEMENTATIONS[name](**inputs, k=6), z, 6, exact=True)


@oldest_jax
def test_nan_stays_at_its_position() -> None:
    inputs = make("ragged", whole_numbers=True)
    first, *rest = inputs["code_logits"]
    inputs["code_logits"] = (first.at[2, 3].set(jnp.nan), *rest)
    expected, actual = (f(**inputs, k=5) for f in IMPLEMENTATIONS.values())
    is_nan = np.zeros((5, 9), bool)
    is_nan[2, 3] = True
    for log_z in (expected[2], actual[2]):
        np.testing.assert_array_equal(np.isnan(log_z), is_nan)
    np.testing.assert_array_equal(actual[1][~is_nan], expected[1][~is_nan])


def test_tokens_with_logits_of_their_own() -> None:
    inputs = make("ragged", whole_numbers=True)
    own = loss.Own(
        jnp.asarray([3, 1008, 500, 4]),
        jnp.round(9 * jax.random.normal(jax.random.key(0), (5, 9, 4))),
    )
    for bias in (None, inputs["bias"]):
        z = loss.logits(**(inputs | {"bias": bias}), own=own)
        for k in (1, 7, 1009):
            actual = jax.jit(loss.top_k, static_argnames="k")(
                **(inputs | {"bias": bias}), own=own, k=k
            )
            check(actual, z, k, exact=True)


@newest_jax
def test_within_shard_map() -> None:
    inputs = make("ragged", whole_numbers=True)
    inputs["code_logits"] = tuple(l[:4] for l in inputs["code_logits"])
    row, whole = PartitionSpec("data"), PartitionSpec()
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    kernel = functools.partial(IMPLEMENTATIONS["pallas_tpu"], k=9)
    with jax.set_mesh(mesh):
        run = jax.shard_map(
            lambda code_logits, *others: kernel(code_logits, others[0], bias=others[1]),
            in_specs=(row, whole, whole),
            out_specs=(row, row, row),
        )
        args = jax.device_put(
            (inputs["code_logits"], inputs["assignment"], inputs["bias"]),
            jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), (row, whole, whole)),
        )
        actual = jax.tree.map(np.asarray, jax.jit(run)(*args))
    check(actual, multi.logits(**(inputs | {"scale": None})), 9, exact=True)


def test_what_it_cannot_do() -> None:
    inputs = make("ragged", whole_numbers=True)
    for k in (0, 1010):
        with pytest.raises(UserError, match=f"top_k={k}: must be in 1 .. 1009"):
            streaming.top_k(**inputs, k=k)
    with pytest.raises(UserError, match="implementation='pallas_tpu': needs a tpu"):
        streaming.top_k(**inputs, k=1, implementation="pallas_tpu")
    with pytest.raises(NotSupported, match="code logits; at most 4096"):
        tpu.top_k((jnp.zeros((4, 5000)),), jnp.zeros((7, 1), jnp.int32), 1)
    with dispatch.record() as traced:
        streaming.top_k(**inputs, k=1)
    assert traced == [("codebook.streaming.top_k", "xla")]


def test_no_positions() -> None:
    code_logits = tuple(jnp.zeros((0, 4)) for _ in range(3))
    z, tokens, log_z = streaming.top_k(code_logits, jnp.zeros((20, 3), jnp.int32), 5)
    chex.assert_shape([z, tokens, log_z], [(0, 5), (0, 5), (0,)])
