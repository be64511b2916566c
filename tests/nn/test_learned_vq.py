"""Codes that are learned: what is drawn, what its gradient is, and that it finds better codes."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from versions import oldest_jax

from vqcx_jax import sharding
from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.errors import UserError
from vqcx_jax.nn import functional
from vqcx_jax.nn.heads import LearnedVQHead, MultiVQHead
from vqcx_jax.ops.codebook import straight_through

pytestmark = oldest_jax

V, D, K, M, C = 24, 8, 5, 4, 3


def make_head(**options: Any) -> Any:
    rng = np.random.default_rng(0)
    assignment = jnp.asarray(rng.integers(K, size=(V, M)))
    codebooks = jnp.asarray(rng.standard_normal((M, K, D // M)), jnp.float32)
    options = {"form": "product", "codebooks": codebooks, "token_scale": True} | options
    return LearnedVQHead(assignment, K, D, num_candidates=C, rngs=nnx.Rngs(0), **options)


@pytest.fixture(scope="module")
def h() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (4, 6, D))


TARGETS = jnp.arange(24).reshape(4, 6)


def test_nearest_codes() -> None:
    codebooks = np.random.default_rng(1).standard_normal((2, 7, 3))
    found = np.asarray(straight_through.nearest_codes(jnp.asarray(codebooks), 4))
    distances = np.linalg.norm(codebooks[:, :, None] - codebooks[:, None], axis=-1)
    np.testing.assert_array_equal(found, np.argsort(distances, axis=-1)[..., :4])


def test_choices_are_drawn_from_the_softmax_of_scores() -> None:
    scores = jnp.asarray([1.0, 0.0, -1.0])
    drawn = straight_through.choice(jnp.broadcast_to(scores, (20_000, 3)), jax.random.key(0))
    # Three standard deviations of 20,000 draws.
    np.testing.assert_allclose(drawn.mean(axis=0), jax.nn.softmax(scores), atol=3 * 0.5 / 141)
    np.testing.assert_array_equal(np.sort(drawn, axis=-1), np.eye(3)[[2] * 20_000])


def test_the_gradient_of_a_choice_is_that_of_the_softmax() -> None:
    scores, weights = jnp.asarray([0.3, 0.1, -2.0]), jnp.asarray([1.0, 5.0, 2.0])
    actual = jax.grad(lambda s: straight_through.choice(s, None) @ weights)(scores)
    expected = jax.grad(lambda s: jax.nn.softmax(s) @ weights)(scores)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("form", ["product", "additive"])
def test_without_noise_it_is_the_head_of_its_token_map(form: str, h: jax.Array) -> None:
    codebooks = {} if form == "product" else {"codebooks": None}
    head = make_head(form=form, own_tokens=jnp.asarray([3, 4]), **codebooks)
    head.scores[...] = jax.random.normal(jax.random.key(1), (V, M, C))
    head.eval()
    plain: Any = MultiVQHead(
        head.token_map(),
        K,
        D,
        form=form,
        own_tokens=head.own_tokens[...],
        token_scale=True,
        codebooks=head.codebooks[...],
        own_vectors=head.own_vectors[...],
        rngs=nnx.Rngs(0),
    )
    assert np.any(head.token_map() != head.assignment[...])
    chex.assert_trees_all_close(head.nll(h, TARGETS), plain.nll(h, TARGETS), rtol=1e-5)
    chex.assert_trees_all_close(head.logits(h), plain.logits(h), rtol=1e-5, atol=1e-6)


def test_summed_nll_trains_the_map(h: jax.Array) -> None:
    """Scores have a gradient, though two codebooks without scales would close."""
    assignment = jnp.stack([jnp.arange(V) % K, jnp.arange(V) % (K - 1)], axis=1)
    head: Any = LearnedVQHead(assignment, K, D, num_candidates=C, rngs=nnx.Rngs(0))
    is_token = jnp.ones(TARGETS.shape, bool)

    def loss(head: Any) -> jax.Array:
        return head.summed_nll(h, TARGETS, is_token)[0]

    gradient = nnx.grad(loss)(head)
    assert np.any(gradient.scores[...])
    chex.assert_trees_all_close(loss(head), jnp.sum(head.nll(h, TARGETS)[0]), rtol=1e-5)


def test_noise_is_new_for_every_batch_and_gone_in_evaluation(h: jax.Array) -> None:
    head = make_head()
    head.scores[...] = jnp.zeros((V, M, C))

    def spread() -> Any:
        """The loss of one row in batches that differ elsewhere, in one token or in their order."""
        others = [TARGETS, *(TARGETS.at[1, 2].set(i) for i in range(3)), TARGETS.at[1:].set(5)]
        others.append(TARGETS.at[1:].set(TARGETS[1:][::-1]))
        return np.std([head.nll(h, x)[0][0, 0] for x in others])

    assert spread() > 0.01
    np.testing.assert_array_equal(head.nll(h, TARGETS)[0], head.nll(h, TARGETS)[0])
    head.eval()
    assert spread() < 1e-6


def test_noise_is_new_for_every_step() -> None:
    """Of the same batch, as soon as any score has changed by a rounding."""
    scores = jnp.zeros((V, M, C)) + 1
    other = scores.at[3, 1, 2].set(jnp.nextafter(jnp.float32(1), jnp.float32(2)))
    keys = [straight_through.noise_key(TARGETS, x) for x in (scores, other)]
    assert jax.random.bits(keys[0]) != jax.random.bits(keys[1])


@pytest.mark.parametrize("axis_type", ["explicit", "auto"])
def test_loss_and_gradients_on_a_mesh(axis_type: str, h: jax.Array) -> None:
    """With the noise of one device, though activations are summed in another order."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, axis_type)
    head, rules = make_head(own_tokens=jnp.asarray([3, 4])), ShardingRules()
    head.scores[...] = jnp.zeros((V, M, C))
    graphdef, params, buffers = functional.split(head)

    @jax.jit
    def loss_and_gradients(params: Any, buffers: Any, h: jax.Array, targets: jax.Array) -> Any:
        def loss(params: Any, h: jax.Array) -> jax.Array:
            head = nnx.merge(graphdef, params, buffers)
            return head.summed_nll(h, targets, jnp.ones_like(targets, bool))[0]

        return jax.value_and_grad(loss, (0, 1))(params, h)

    expected = loss_and_gradients(params, buffers, h, TARGETS)
    with jax.set_mesh(mesh):
        arrays = jax.device_put((params, buffers), functional.shardings(head, mesh, rules))
        axes = (("batch", None, None), ("batch", None))
        of_batch = tuple(sharding.named_sharding(mesh, x, rules) for x in axes)
        actual = loss_and_gradients(*arrays, *jax.device_put((h, TARGETS), of_batch))
    chex.assert_trees_all_close(jax.device_get(actual), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gumbel", [True, False])
def test_it_finds_the_codes_that_made_the_text(gumbel: bool) -> None:
    """Targets are drawn by a head with other codes: all scores but the codes are known."""
    rng = np.random.default_rng(0)
    teacher = make_head()
    h = jnp.asarray(4 * rng.standard_normal((64, 16, D)), jnp.float32)
    wrong = teacher.neighbours[...][jnp.arange(M), teacher.assignment[...], 1]
    head = make_head(gumbel=gumbel)
    head.assignment[...] = wrong
    targets = teacher.sample(h, jax.random.key(0))
    graphdef, params, buffers = functional.split(head)

    def loss(scores: jax.Array, h: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graphdef, params | {"scores": scores}, buffers)
        return jnp.mean(model.nll(h, targets)[0])

    optimizer = optax.adam(0.1)

    @jax.jit
    def step(scores: jax.Array, state: Any) -> Any:
        gradient = jax.grad(loss)(scores, h)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(scores, updates), state

    scores = params["scores"]
    before, state = loss(scores, h), optimizer.init(scores)
    for _ in range(150):
        scores, state = step(scores, state)
    teacher.eval()
    floor = jnp.mean(teacher.nll(h, targets)[0])
    head.scores[...] = scores
    head.eval()
    after = jnp.mean(head.nll(h, targets)[0])
    # Draws try other codes; without them the search ends earlier.
    assert after - floor < (0.3 if gumbel else 0.5) * (before - floor)


@pytest.mark.parametrize("number", [0, 6])
def test_bad_number_of_candidates(number: int) -> None:
    with pytest.raises(UserError, match=f"num_candidates={number}: must be in 1 .. 5"):
        LearnedVQHead(jnp.zeros((V, M), int), K, D, num_candidates=number, rngs=nnx.Rngs(0))
