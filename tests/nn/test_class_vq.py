"""The head of product codes in classes: the interface of every head, and its own sampler."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from drawn import assert_drawn_from
from flax import nnx
from versions import oldest_jax

from vqcx_jax import sharding
from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.errors import UserError
from vqcx_jax.nn import functional
from vqcx_jax.nn.heads import ClassVQHead
from vqcx_jax.ops import device, sampling
from vqcx_jax.ops.codebook import classes

V, C, M, K, D = 24, 4, 2, 6, 8
# Five tokens are frequent; the others are in four classes.
CLASS_OF = np.random.default_rng(0).permutation(np.append(np.full(5, -1), np.arange(19) % C))
CODES = jnp.asarray(np.random.default_rng(1).integers(K, size=(V + C, M)), jnp.int32)


def make_head(token_bias: bool = True, token_scale: bool = True, **options: Any) -> Any:
    options |= {"token_bias": token_bias, "token_scale": token_scale}
    tokens = classes.arrange(CLASS_OF, C)
    head = ClassVQHead(tokens, CODES, K, D, rngs=nnx.Rngs(0), **options)
    graphdef, params, buffers = functional.split(head)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
    return nnx.merge(graphdef, params, buffers)


@pytest.fixture(scope="module")
def h() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (4, 6, D))


@oldest_jax
@pytest.mark.parametrize(("token_bias", "token_scale"), [(True, True), (False, False)])
def test_nll_and_top_k_are_those_of_the_logits(
    token_bias: bool, token_scale: bool, h: jax.Array
) -> None:
    head = make_head(token_bias, token_scale)
    targets = jnp.arange(24).reshape(4, 6)
    (nll, log_z), z, (log_probs, tokens) = jax.jit(
        lambda head, h: (head.nll(h, targets), head.logits(h), head.top_k(h, 5))
    )(head, h)
    assert not np.any(log_z)
    chex.assert_trees_all_close(scipy.special.logsumexp(np.float64(z), axis=-1), 0, atol=1e-5)
    expected = -np.take_along_axis(np.asarray(z), np.asarray(targets)[..., None], axis=-1)[..., 0]
    chex.assert_trees_all_close(nll, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(tokens, jax.lax.top_k(z, 5)[1])
    chex.assert_trees_all_close(log_probs, jax.lax.top_k(z, 5)[0], rtol=1e-5, atol=1e-5)


@oldest_jax
@pytest.mark.parametrize("token_scale", [True, False])
def test_tied_embedding_is_the_vectors(token_scale: bool) -> None:
    """Those of which the logits of the first level are made, for every token."""
    head, tokens = make_head(token_scale=token_scale), jnp.arange(V).reshape(4, 6)
    codebooks, codes = np.asarray(head.codebooks[...]), np.asarray(CODES[:V])
    expected = np.concatenate([codebooks[m][codes[:, m]] for m in range(M)], axis=-1)
    if token_scale:
        expected = expected * np.asarray(head.scale[...])[:V, None]
    embedded = head.embed(tokens)
    chex.assert_trees_all_close(embedded.reshape(V, D), expected, rtol=1e-6, atol=1e-6)


@oldest_jax
@pytest.mark.parametrize("platform", ["cpu", pytest.param("tpu", marks=oldest_jax)])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 2.0}, {"top_k": 4}, {"temperature": 2.0, "top_p": 0.4}],
    ids=str,
)
def test_samples(
    options: dict[str, Any], platform: str, h: jax.Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what samples on accelerators as well, which looks at all classes at once."""
    monkeypatch.setattr(device, "current", lambda: device.Device(platform, ""))
    head, row = make_head(implementation="xla"), h[:1, :1]
    rows = jnp.broadcast_to(row, (20, 500, D))
    tokens = jax.jit(lambda head: head.sample(rows, jax.random.key(0), **options))(head)
    p = scipy.special.softmax(np.float64(head.logits(row)[0, 0]) / options.get("temperature", 1))
    p[np.argsort(-p)[options.get("top_k", V) :]] = 0
    if "top_p" in options:
        p[np.isneginf(sampling.nucleus(jnp.log(jnp.float32(p)), options["top_p"]))] = 0
    assert_drawn_from(np.bincount(tokens.ravel(), minlength=V), p / p.sum())


def test_no_tokens_to_choose_from_are_refused(h: jax.Array) -> None:
    with pytest.raises(UserError, match="top_k=0: must be in 1 .. 24"):
        make_head().sample(h, jax.random.key(0), top_k=0)


@pytest.mark.parametrize("codes", [(), pytest.param(("tensor",), marks=oldest_jax)], ids=str)
@pytest.mark.parametrize("axis_type", ["explicit", "auto"])
def test_losses_and_gradients_on_a_mesh(
    axis_type: str, codes: tuple[str, ...], h: jax.Array
) -> None:
    """Codes may be stored in parts: every device computes with all of them."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, axis_type)
    targets, rules = jnp.arange(24).reshape(4, 6), ShardingRules(codes=codes)
    head = make_head(rules=rules)
    graphdef, params, buffers = functional.split(head)

    @jax.jit
    def loss_and_gradients(params: Any, buffers: Any, h: jax.Array, targets: jax.Array) -> Any:
        def loss(params: Any, h: jax.Array) -> jax.Array:
            head = nnx.merge(graphdef, params, buffers)
            tied = h + head.embed(targets)
            nll = jnp.sum(head.nll(tied, targets)[0])
            log_p = head.log_probs(tied, jnp.stack([targets, 23 - targets], axis=-1))
            return 2 * nll + jnp.sum(head.summed_nll(tied, targets, targets > 3)[0]) - log_p.sum()

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


@oldest_jax
@pytest.mark.parametrize("axis_type", ["explicit", "auto"])
def test_top_k_on_a_mesh(axis_type: str, h: jax.Array) -> None:
    """Each device looks into as many classes as its own positions need."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, axis_type)
    head, rules = make_head(), ShardingRules()
    expected = head.top_k(h, 5)
    graphdef, params, buffers = functional.split(head)
    with jax.set_mesh(mesh):
        arrays = jax.device_put((params, buffers), functional.shardings(head, mesh, rules))
        rows = jax.device_put(h, sharding.named_sharding(mesh, ("batch", None, None), rules))
        top_k = jax.jit(lambda arrays, rows: nnx.merge(graphdef, *arrays).top_k(rows, 5))
        log_probs, tokens = jax.device_get(top_k(arrays, rows))
    np.testing.assert_array_equal(tokens, expected[1])
    chex.assert_trees_all_close(log_probs, np.asarray(expected[0]), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    tokens, rngs = classes.arrange(CLASS_OF, C), nnx.Rngs(0)
    with pytest.raises(UserError, match=r"assignment has shape \(24, 2\): must have 28 rows"):
        ClassVQHead(tokens, CODES[:V], K, D, rngs=rngs)
    with pytest.raises(UserError, match="dim=7: must be a multiple of the 2 codebooks"):
        ClassVQHead(tokens, CODES, K, 7, rngs=rngs)
    with pytest.raises(UserError, match="assignment holds code 5; codes must be in 0 .. 4"):
        ClassVQHead(tokens, CODES, K - 1, D, rngs=rngs)
    with pytest.raises(UserError, match="num_codes=25: must be at most the 24 tokens"):
        ClassVQHead(tokens, CODES, 25, D, rngs=rngs)
    with pytest.raises(UserError, match=r"scale has shape \(24,\); it must be \(28,\)"):
        ClassVQHead(tokens, CODES, K, D, token_scale=True, scale=jnp.ones(V), rngs=rngs)
    with pytest.raises(UserError, match="token_scale=False has none"):
        ClassVQHead(tokens, CODES, K, D, scale=jnp.ones(V + C), rngs=rngs)
