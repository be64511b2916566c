"""A head whose tokens change their codes: that it finds better ones than it starts with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from versions import oldest_jax

from vqcx_jax.nn import functional
from vqcx_jax.nn.heads import MultiVQHead, ReassignedVQHead

pytestmark = oldest_jax

V, D, K, M = 40, 8, 4, 2


def trained_nll(head: Any, teacher: Any, steps: int) -> tuple[float, float]:
    """Mean loss after training on what `teacher` draws, and the teacher's own."""
    graphdef, params, buffers = functional.split(head)
    optimizer = optax.adam(0.05)

    def sample(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_h, of_targets = jax.random.split(key)
        h = 2 * jax.random.normal(of_h, (16, 32, D))
        return h, teacher.sample(h, of_targets)

    def loss(params: Any, buffers: Any, h: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.mean(nnx.merge(graphdef, params, buffers).nll(h, targets)[0])

    @jax.jit
    def step(carry: Any, i: jax.Array) -> Any:
        params, buffers, state = carry
        h, targets = sample(jax.random.key(i))
        gradient = jax.grad(loss)(params, buffers, h, targets)
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
        model = nnx.merge(graphdef, params, buffers)
        model.adapt(model.observe(h, targets, jnp.ones(targets.shape, bool)), i + 1)
        return (params, functional.split(model)[2], state), None

    carry = (params, buffers, optimizer.init(params))
    (params, buffers, _), _ = jax.lax.scan(step, carry, jnp.arange(steps))
    h, targets = sample(jax.random.key(steps))
    return float(loss(params, buffers, h, targets)), float(jnp.mean(teacher.nll(h, targets)[0]))


@pytest.mark.parametrize(
    ("form", "token_scale"), [("product", False), ("product", True), ("additive", False)]
)
def test_it_finds_better_codes(form: Any, token_scale: bool) -> None:
    rng = np.random.default_rng(0)
    width = D // M if form == "product" else D
    codebooks = jnp.asarray(rng.standard_normal((M, K, width)), jnp.float32)
    options = {"form": form, "token_scale": token_scale, "rngs": nnx.Rngs(0)}
    codes = jnp.asarray(rng.integers(K, size=(V, M)))
    teacher = MultiVQHead(codes, K, D, codebooks=codebooks, **options)
    start = jnp.asarray(rng.integers(K, size=(V, M)))
    fixed, floor = trained_nll(MultiVQHead(start, K, D, **options), teacher, 300)
    head = ReassignedVQHead(start, K, D, every=25, decay=0.9, **options)
    learned, _ = trained_nll(head, teacher, 300)
    assert learned - floor < 0.5 * (fixed - floor)
