"""256,000 tokens, of which most codes have many and some have one or none, and odd sizes.

Losses and gradients against definitions in float64, as in the tests of each, with few positions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from class_cases import make_weights
from multi_cases import FORMS
from versions import oldest_jax

from vqcx_jax.ops import softmax
from vqcx_jax.ops.codebook import bilinear, classes, closed_form, loss, reference
from vqcx_jax.ops.softmax import low_rank, summed

pytestmark = oldest_jax

D, N = 8, 5
SIZES = (7, 256_000)
Loss = Callable[..., Any]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def ragged(vocab_size: int, num_codes: int) -> jax.Array:
    """Code 0 has no token, code 1 has one; of the others some have ten times as many as others."""
    rng = np.random.default_rng(0)
    weights = np.append([0.0, 0.0], rng.uniform(1, 10, num_codes - 2))
    codes = rng.choice(num_codes, vocab_size, p=weights / weights.sum())
    codes[vocab_size // 2] = 1
    return jnp.asarray(codes)


def targets_of(vocab_size: int) -> jax.Array:
    """The first, the last and the one that has a code for itself among them."""
    others = np.random.default_rng(1).integers(vocab_size, size=N - 3)
    return jnp.asarray([0, vocab_size - 1, vocab_size // 2, *others])


def log_softmax_nll(z: jax.Array, targets: jax.Array) -> jax.Array:
    return reference.nll_of_logits(z, targets)[0]


def one_codebook(vocab_size: int) -> tuple[Loss, Loss, Any]:
    codes = ragged(vocab_size, min(503, vocab_size - 2))
    targets = targets_of(vocab_size)
    params = normal(2, int(codes.max()) + 1, D), normal(3, vocab_size)
    return (
        lambda h, p: closed_form.nll(h, p[0], codes, targets, p[1])[0],
        lambda h, p: log_softmax_nll(h @ p[0].T[:, codes] + p[1], targets),
        params,
    )


def several_codebooks(vocab_size: int, num_codebooks: int) -> tuple[Loss, Loss, Any]:
    num_codes = max(4, round(vocab_size ** (1 / num_codebooks)))
    num_codes = min(num_codes, vocab_size - 2)
    assignment = jnp.stack(
        [jnp.roll(ragged(vocab_size, num_codes), m) for m in range(num_codebooks)], axis=1
    )
    targets = targets_of(vocab_size)
    code_logits, logits = FORMS["additive"]
    nll = bilinear.nll if num_codebooks == 2 else loss.nll
    params = (
        tuple(normal(m, num_codes, D) for m in range(num_codebooks)),
        normal(3, vocab_size),
    )
    return (
        lambda h, p: nll(code_logits(h, p[0]), assignment, targets, p[1])[0],
        lambda h, p: log_softmax_nll(logits(h, p[0], assignment, p[1]), targets),
        params,
    )


def full(vocab_size: int, is_summed: bool) -> tuple[Loss, Loss, Any]:
    targets = targets_of(vocab_size)
    counts = jnp.ones((N,), bool)

    def fast(h: jax.Array, p: Any) -> jax.Array:
        if is_summed:
            return summed.summed_nll(h, p[0], targets, counts, p[1])[0][None]
        return softmax.streamed_nll(h, p[0], targets, p[1])[0]

    def plain(h: jax.Array, p: Any) -> jax.Array:
        each = log_softmax_nll(h @ p[0].T + p[1], targets)
        return jnp.sum(each)[None] if is_summed else each

    return fast, plain, (normal(2, vocab_size, D) / D**0.5, normal(3, vocab_size))


def in_classes(vocab_size: int) -> tuple[Loss, Loss, Any]:
    num_classes = max(2, round(vocab_size**0.5))
    class_of = np.arange(vocab_size) % num_classes
    class_of[: vocab_size // 3 : 2] = -1
    class_of[(class_of == 1) & (np.arange(vocab_size) != vocab_size // 2)] = 0
    class_of[vocab_size // 2] = 1  # Alone.
    tokens = classes.arrange(class_of, num_classes)
    shape = (4, min(16, vocab_size), D // 4)
    weights = make_weights(np.random.default_rng(0), tokens, shape, bias=True, scale=True)
    targets = targets_of(vocab_size)

    def fast(h: jax.Array, p: Any) -> jax.Array:
        codebooks, scale, bias = p
        replaced = weights._replace(codebooks=codebooks, scale=scale, bias=bias)
        return classes.nll(h, replaced, tokens, targets)

    def plain(h: jax.Array, p: Any) -> jax.Array:
        """As `reference.class_log_probs`, without an array of every class and token."""
        codebooks, scale, bias = p
        codes = weights.codes.of_nodes
        vectors = jnp.concatenate([rows[codes[:, m]] for m, rows in enumerate(codebooks)], axis=1)
        z_UxN = (scale[:, None] * vectors) @ h.T + bias[:, None]
        z_VxN, z_CxN = z_UxN[:vocab_size], z_UxN[vocab_size:]
        is_frequent = jnp.asarray(class_of) < 0
        z_of_entries = jnp.concatenate([z_VxN[class_of < 0], z_CxN])
        log_z_N = jax.nn.logsumexp(z_of_entries, axis=0)
        # One class more, for frequent tokens.
        class_V = jnp.where(is_frequent, num_classes, class_of)
        log_z_CxN = jnp.log(jax.ops.segment_sum(jnp.exp(z_VxN), class_V, num_classes + 1))
        index, class_N = jnp.arange(N), jnp.asarray(class_of)[targets]
        z_N = z_VxN[targets, index]
        in_class = z_CxN[class_N, index] + z_N - log_z_CxN[class_N, index]
        return log_z_N - jnp.where(class_N < 0, z_N, in_class)

    return fast, plain, (weights.codebooks, weights.scale, weights.bias)


def of_low_rank(vocab_size: int) -> tuple[Loss, Loss, Any]:
    targets = targets_of(vocab_size)
    params = normal(1, 3, D) / D**0.5, normal(2, vocab_size, 3), normal(3, vocab_size)
    return (
        lambda h, p: low_rank.nll(h, p[0], p[1], targets, p[2])[0],
        lambda h, p: log_softmax_nll(h @ p[0].T @ p[1].T + p[2], targets),
        params,
    )


MAKERS: dict[str, Callable[[int], tuple[Loss, Loss, Any]]] = {
    "one_codebook": one_codebook,
    "two_codebooks": lambda v: several_codebooks(v, 2),
    "three_codebooks": lambda v: several_codebooks(v, 3),
    "full_streamed": lambda v: full(v, False),
    "full_summed": lambda v: full(v, True),
    "classes": in_classes,
    "low_rank": of_low_rank,
}


def with_gradients(nll: Loss) -> Loss:
    def function(h: jax.Array, params: Any) -> Any:
        values, vjp = jax.vjp(nll, h, params)
        return values, vjp(jnp.linspace(0.5, 1.5, len(values), dtype=values.dtype))

    return function


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("name", MAKERS)
def test_losses_and_gradients(name: str, vocab_size: int, in_float64: Any, max_error: Any) -> None:
    fast, plain, params = MAKERS[name](vocab_size)
    h = normal(4, N, D)
    values, gradients = jax.jit(with_gradients(fast))(h, params)
    expected_values, expected = in_float64(with_gradients(plain), h, params)
    assert values.dtype == jnp.float32
    actual = [values, *jax.tree.leaves(gradients)]
    for a, e in zip(actual, [expected_values, *jax.tree.leaves(expected)], strict=True):
        assert max_error(a, e) <= 1e-5
