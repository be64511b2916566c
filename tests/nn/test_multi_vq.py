"""Heads of several codebooks: the interface of every head, and what is their own."""

import contextlib
import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from versions import newest_jax, oldest_jax

from vqcx_jax import sharding
from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.errors import UserError
from vqcx_jax.nn import functional
from vqcx_jax.nn.heads import Head, MultiVQHead
from vqcx_jax.ops import device, dispatch, sampling
from vqcx_jax.ops.labels import IGNORE_ID

V, D, K = 24, 8, 4
OWN = jnp.asarray([3, 0, 17])
HEADS: dict[str, dict[str, Any]] = {
    "one codebook and own vectors": {"m": 1, "own_tokens": OWN},
    "two additive": {"m": 2, "token_bias": False},
    "two product, own vectors": {"m": 2, "form": "product", "own_tokens": OWN},
    "four product, scale, own vectors, cap": {
        "m": 4,
        "form": "product",
        "own_tokens": OWN,
        "token_scale": True,
        "logit_soft_cap": 2.0,
    },
    "three additive, cap": {"m": 3, "logit_soft_cap": 2.0},
    "two product, scale, own vectors": {
        "m": 2,
        "form": "product",
        "own_tokens": OWN,
        "token_scale": True,
    },
    "three additive": {"m": 3},
    "three additive, by codes": {"m": 3, "expand_vectors": False},
}


def make_head(
    name: str, rules: ShardingRules | None = None, dtype: Any = jnp.float32, **changes: Any
) -> Any:
    """With random parameters everywhere."""
    options = HEADS[name] | changes
    rng = np.random.default_rng(0)
    assignment = jnp.asarray(rng.integers(K, size=(V, options.pop("m"))))
    head = MultiVQHead(assignment, K, D, rules=rules, dtype=dtype, rngs=nnx.Rngs(0), **options)
    graphdef, params, buffers = functional.split(head)
    params = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
    return nnx.merge(graphdef, params, buffers)


@pytest.fixture(scope="module")
def h() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (4, 6, D))


@pytest.fixture(scope="module")
def targets() -> jax.Array:
    return jnp.arange(24).reshape(4, 6)


def vectors(head: Any) -> np.ndarray:
    """Every token's vector as the class docstring has it, uncapped."""
    codebooks, assignment = np.float64(head.codebooks[...]), np.asarray(head.assignment[...])
    rows = [codes[assignment[:, m]] for m, codes in enumerate(codebooks)]
    w = np.concatenate(rows, axis=1) if head.form == "product" else sum(rows)
    if head.has_scale:
        w = w * np.float64(head.scale[...])[:, None]
    if head.has_own:
        w[np.asarray(OWN)] = head.own_vectors[...]
    return w


@pytest.mark.parametrize("name", [n for n in HEADS if "cap" not in n])
def test_logits_are_the_formula(name: str, h: jax.Array) -> None:
    head = make_head(name)
    expected = np.float64(h) @ vectors(head).T
    if head.has_bias:
        expected = expected + np.float64(head.bias[...])
    chex.assert_trees_all_close(np.float64(head.logits(h)), expected, rtol=0, atol=1e-5)


@oldest_jax
@pytest.mark.parametrize("name", HEADS)
def test_tied_embedding_is_the_vectors(name: str, targets: jax.Array) -> None:
    head = make_head(name)
    expected = vectors(head)[np.asarray(targets)]
    chex.assert_trees_all_close(np.float64(head.embed(targets)), expected, rtol=1e-5, atol=1e-6)


def test_soft_cap_bounds_the_sum_of_codes_and_own_vectors(h: jax.Array) -> None:
    head = make_head("three additive, cap")
    head.bias[...] *= 0
    assert 1.5 < np.abs(head.logits(100 * h)).max() <= 2.0
    head = make_head("four product, scale, own vectors, cap")
    head.bias[...] *= 0
    head.scale[...] = jnp.ones(V)
    z = head.logits(100 * h)
    assert np.abs(z).max() <= 2.0
    own = np.float64(100 * h) @ np.float64(head.own_vectors[...]).T
    chex.assert_trees_all_close(np.float64(z[..., OWN]), 2 * np.tanh(own / 2), atol=1e-5)


@oldest_jax
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_nll_and_top_k_are_those_of_the_logits(
    name: str, dtype: Any, h: jax.Array, targets: jax.Array
) -> None:
    head = make_head(name, dtype=dtype)
    h = h.astype(dtype)

    @jax.jit
    def outputs(head: Any, h: jax.Array) -> Any:
        return head.nll(h, targets), head.logits(h), head.top_k(h, 5)

    (nll, log_z), z, (log_probs, tokens) = outputs(head, h)
    log_p = scipy.special.log_softmax(np.float64(z), axis=-1)
    expected = -np.take_along_axis(log_p, np.asarray(targets)[..., None], axis=-1)[..., 0]
    # Expanded vectors are rounded to bfloat16 once more: 2^-8 of products up to about 10.
    atol = 0.04 if head.expands() and dtype == jnp.bfloat16 else 2e-6
    chex.assert_trees_all_close(np.float64(nll), expected, rtol=1e-5, atol=atol)
    chex.assert_trees_all_close(log_z, jax.nn.logsumexp(z, axis=-1), rtol=1e-5, atol=atol)
    np.testing.assert_array_equal(tokens, jax.lax.top_k(z, 5)[1])
    expected = np.take_along_axis(log_p, np.asarray(tokens), axis=-1)
    chex.assert_trees_all_close(np.float64(log_probs), expected, rtol=1e-5, atol=2e-6)


def sums_and_gradients(head: Any, h: jax.Array, targets: jax.Array, is_token: jax.Array) -> Any:
    """Also those of the sum of every position's loss, which any head has."""
    graphdef, params, buffers = functional.split(head)

    def summed(params: Any, h: jax.Array) -> Any:
        return nnx.merge(graphdef, params, buffers).summed_nll(h, targets, is_token, 0.1)

    def each(params: Any, h: jax.Array) -> Any:
        head = nnx.merge(graphdef, params, buffers)
        return Head.summed_nll(head, h, targets, is_token, 0.1)

    both = (jax.value_and_grad(f, (0, 1), has_aux=True)(params, h) for f in (summed, each))
    return tuple(both)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize(
    ("form", "cap"),
    [("additive", None), pytest.param("product", 2.0, marks=newest_jax)],
)
def test_summed_nll_of_two_codebooks(
    kernel: bool,
    form: str,
    cap: float | None,
    h: jax.Array,
    targets: jax.Array,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By plain JAX, and on a device that says it is a TPU by the kernel, which is interpreted."""
    head = make_head("two additive", form=form, logit_soft_cap=cap, token_bias=True)
    targets = targets.at[0, 0].set(IGNORE_ID)
    is_token = jnp.arange(targets.size).reshape(targets.shape) != 4
    run = jax.jit(sums_and_gradients)
    with contextlib.ExitStack() as stack:
        if kernel:
            monkeypatch.setattr(device, "current", lambda: device.Device("tpu", "TPU v6e"))
            stack.enter_context(pltpu.force_tpu_interpret_mode())
        traced = stack.enter_context(dispatch.record())
        actual, expected = run(head, h, targets, is_token)
    assert traced == [("codebook.pairs.summed_nll", "pallas_tpu" if kernel else "xla")]
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@oldest_jax
@pytest.mark.parametrize("axis_type", ["explicit", "auto"])
@pytest.mark.parametrize(
    "name", ["two additive", "four product, scale, own vectors, cap", "three additive"]
)
def test_loss_and_gradients_on_a_mesh(
    name: str, axis_type: str, h: jax.Array, targets: jax.Array
) -> None:
    """Codes over the tensor axis, tokens over data and fsdp."""
    rules = ShardingRules(codes=("tensor",))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, axis_type)
    head = make_head(name, rules)
    graphdef, params, buffers = functional.split(head)

    @jax.jit
    def loss_and_gradients(params: Any, buffers: Any, h: jax.Array, targets: jax.Array) -> Any:
        def loss(params: Any, h: jax.Array) -> jax.Array:
            head = nnx.merge(graphdef, params, buffers)
            nll, log_z = head.nll(h, targets)
            summed, _ = head.summed_nll(h, targets, targets > 3, 0.2)
            return jnp.sum(nll) + 0.1 * jnp.sum(log_z**2) + summed

        return jax.value_and_grad(loss, (0, 1))(params, h)

    expected = loss_and_gradients(params, buffers, h, targets)
    with jax.set_mesh(mesh):
        arrays = jax.device_put((params, buffers), functional.shardings(head, mesh, rules))
        batch = jax.device_put(
            (h, targets),
            (
                sharding.named_sharding(mesh, ("batch", None, None), rules),
                sharding.named_sharding(mesh, ("batch", None), rules),
            ),
        )
        actual = loss_and_gradients(*arrays, *batch)
    chex.assert_trees_all_close(jax.device_get(actual), expected, rtol=1e-5, atol=1e-5)


def test_expanded_vectors_have_the_gradients_of_codes(h: jax.Array, targets: jax.Array) -> None:
    """All of them: codebooks, scales, biases and own vectors."""

    def loss_and_gradients(expand: bool) -> Any:
        head = make_head("two product, scale, own vectors", expand_vectors=expand)
        assert head.expands() == expand
        graphdef, params, buffers = functional.split(head)

        def loss(params: Any, h: jax.Array) -> jax.Array:
            return jnp.sum(nnx.merge(graphdef, params, buffers).nll(h, targets)[0])

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, h)

    expanded, codes = loss_and_gradients(True), loss_and_gradients(False)
    chex.assert_trees_all_close(expanded, codes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "dim", "expected"),
    [
        ("cpu", 24, False),
        ("cpu", 23, True),
        ("gpu", 3 * K + 1, True),
        ("tpu", 3 * K + 1, False),
        ("tpu", 3 * K, True),
    ],
)
def test_whether_vectors_are_expanded_suits_the_device(
    platform: str, dim: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "current", lambda: device.Device(platform, platform))
    assignment = jnp.zeros((V, 3), jnp.int32)

    def expands(**options: Any) -> bool:
        return MultiVQHead(assignment, K, dim, rngs=nnx.Rngs(0), **options).expands()

    assert expands() == expected
    assert expands(expand_vectors=True)
    assert not expands(logit_soft_cap=1.0)
    # A TPU's kernel is for those that do not ask for plain JAX.
    assert expands(implementation="xla") == (expected or platform == "tpu")


OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 2.0},
    "top_k": {"temperature": 2.0, "top_k": 8},
    "top_p": {"top_p": 0.7},
}


@oldest_jax
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("one codebook and own vectors", "temperature"),
        ("two additive", "temperature"),
        ("two additive", "top_k"),
        ("two product, own vectors", "temperature"),
        ("two product, own vectors", "top_p"),
        ("two product, scale, own vectors", "temperature"),
        ("three additive", "temperature"),
    ],
)
def test_samples(name: str, options: str, h: jax.Array) -> None:
    """Those of the logits, whether or not they are made."""
    head = make_head(name, logit_soft_cap=2.0)
    row = h[:1, :1]
    draw = jax.jit(lambda head, h, key: head.sample(h, key, **OPTIONS[options]))
    tokens = draw(head, jnp.broadcast_to(row, (20, 500, D)), jax.random.key(0))
    chex.assert_shape(tokens, (20, 500))
    chex.assert_type(tokens, jnp.int32)
    of_logits = jax.jit(lambda z, key: sampling.sample(z, key, **OPTIONS[options]))
    z = jnp.broadcast_to(head.logits(row), (20, 500, V))
    others = of_logits(z, jax.random.key(1))
    counts = np.stack([np.bincount(np.ravel(t), minlength=V) for t in (tokens, others)])
    counts = counts[:, counts.sum(axis=0) > 0]
    # A right sampler fails once in 10^4.
    assert scipy.stats.chi2_contingency(counts).pvalue > 1e-4


def test_no_v_logits_for_a_sample(h: jax.Array) -> None:
    """Of two codebooks with 24 tokens, nothing that a position has is that large."""

    def largest(name: str, **options: Any) -> int:
        head = make_head(name)
        rows = jnp.broadcast_to(h[:1, :1], (100, 10, D))
        jaxpr = jax.make_jaxpr(lambda h, key: head.sample(h, key, **options))(
            rows, jax.random.key(0)
        )
        # As text, which shows the bodies of loops and branches too.
        shapes = re.findall(r"\[([0-9,]+)\]", str(jaxpr))
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert largest("two additive") == 1000 * K * K
    assert largest("two additive", top_p=0.5) >= 1000 * V
    assert largest("three additive") >= 1000 * V


@oldest_jax
@pytest.mark.parametrize("axis_type", ["explicit", "auto"])
@pytest.mark.parametrize("name", ["two additive", "two product, own vectors", "three additive"])
def test_samples_on_a_mesh(name: str, axis_type: str, h: jax.Array) -> None:
    rules = ShardingRules(codes=("tensor",), batch=())
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, axis_type)
    head = make_head(name, rules)
    sample = jax.jit(lambda head, h: head.sample(h, jax.random.key(0)))
    expected = sample(head, h)
    graphdef, *arrays = functional.split(head)
    with jax.set_mesh(mesh):
        arrays = jax.device_put(tuple(arrays), functional.shardings(head, mesh, rules))
        batch = jax.device_put(h, sharding.named_sharding(mesh, ("batch", None, None), rules))
        actual = sample(nnx.merge(graphdef, *arrays), batch)
    np.testing.assert_array_equal(actual, expected)


def test_initial_values() -> None:
    codes = jnp.zeros((200, 4), jnp.int32)
    additive = MultiVQHead(codes, 100, 32, own_tokens=jnp.arange(50), rngs=nnx.Rngs(0))
    product = MultiVQHead(codes, 100, 32, form="product", token_scale=True, rngs=nnx.Rngs(0))
    # The vector of a token, a sum of four or a row of 32, has entries of deviation 0.02.
    assert np.std(additive.codebooks[...]) == pytest.approx(0.01, rel=0.03)
    assert np.std(product.codebooks[...]) == pytest.approx(0.02, rel=0.06)
    assert np.std(additive.own_vectors[...]) == pytest.approx(0.02, rel=0.1)
    assert product.codebooks.shape == (4, 100, 8)
    assert np.all(product.scale[...] == 1) and not np.any(product.bias[...])


def test_values_to_start_from() -> None:
    rng = np.random.default_rng(1)
    start = {
        "codebooks": jnp.asarray(rng.random((2, K, 4))),
        "scale": jnp.asarray(rng.random(V)),
        "own_vectors": jnp.asarray(rng.random((3, D))),
    }
    codes = jnp.zeros((V, 2), jnp.int32)
    options = {"form": "product", "token_scale": True, "own_tokens": OWN}
    head = MultiVQHead(codes, K, D, rngs=nnx.Rngs(0), **options, **start)
    for name, value in start.items():
        np.testing.assert_array_equal(getattr(head, name)[...], value)


@pytest.mark.parametrize(
    ("assignment", "options", "message"),
    [
        (np.full((V, 2), 4), {}, r"assignment holds code 4; codes must be in 0 .. 3"),
        (np.full((V, 2), -1), {}, r"assignment holds code -1; codes must be in 0 .. 3"),
        (np.zeros((3, 2), int), {}, r"num_codes=4: must be at most the 3 tokens"),
        (np.zeros((V, 2)), {}, r"assignment has dtype float64"),
        (np.zeros((V, 3), int), {"form": "product"}, r"dim=8: must be a multiple of the 3"),
        (
            np.zeros((V, 3), int),
            {"expand_vectors": True, "logit_soft_cap": 2.0},
            r"expand_vectors=True: must be False or None with logit_soft_cap=2.0",
        ),
        (np.zeros(V, int), {}, r"assignment has shape \(24,\); it must be \(V, M\)"),
        (np.zeros((V, 2), int), {"expand_vectors": True}, "whose loss has a closed form"),
        (np.zeros((V, 2), int), {"form": "prodcut"}, "form='prodcut': must be one of"),
        (np.zeros((V, 2), int), {"scale": np.ones(V)}, "token_scale=False has none"),
        (np.zeros((V, 2), int), {"own_vectors": np.ones((1, D))}, "own_tokens=None has none"),
        (
            np.zeros((V, 2), int),
            {"scale": np.ones(V - 1), "token_scale": True},
            r"scale has shape \(23,\); it must have one value a token, \(24,\)",
        ),
        (
            np.zeros((V, 2), int),
            {"codebooks": np.ones((2, 2, D))},
            r"codebooks has shape \(2, 2, 8\); it must be \(2, 4, 8\)",
        ),
        (np.zeros((V, 2), int), {"own_tokens": np.array([V])}, "own_tokens hold 24; they must be"),
        (
            np.zeros((V, 2), int),
            {"own_tokens": np.array([1, 1])},
            "own_tokens hold 1; they must be",
        ),
        (
            np.zeros((V, 2), int),
            {"own_tokens": np.arange(V)},
            "own_tokens are 24; they must be few",
        ),
        (
            np.zeros((V, 2), int),
            {"own_tokens": np.arange(3), "own_vectors": np.ones((2, D))},
            r"own_vectors has shape \(2, 8\); it must be \(3, 8\)",
        ),
    ],
)
def test_bad_input(assignment: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MultiVQHead(assignment, K, D, rngs=nnx.Rngs(0), **options)
