"""Targets that are no tokens, in every operation that makes losses: never a finite number."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from versions import oldest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops import softmax
from vqcx_jax.ops.codebook import bilinear, classes, closed_form, loss, multi
from vqcx_jax.ops.hierarchical import (
    TwoLevelWeights,
    class_size,
    huffman,
    huffman_paths,
    two_level,
)
from vqcx_jax.ops.labels import IGNORE_ID
from vqcx_jax.ops.softmax import adaptive, low_rank, resident

pytestmark = oldest_jax

V, D, N = 300, 8, 5
_RNG = np.random.default_rng(0)


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(_RNG.standard_normal(shape), jnp.float32)


H, ROWS, BIAS = _normal(N, D), _normal(V, D), _normal(V)
CODES = jnp.asarray(_RNG.integers(7, size=(V, 3)), jnp.int32)
CODEBOOKS = tuple(_normal(7, D) for _ in range(3))
CODE_LOGITS = multi.additive_code_logits(H, CODEBOOKS)
PATHS = jnp.asarray(huffman_paths(np.arange(V) + 1))
CLASSES = classes.arrange(np.arange(V, dtype=np.int32) % 20 - 1, 19)
NODES = V + 19
CLASS_CODES = classes.arrange_codes(
    jnp.asarray(_RNG.integers(7, size=(NODES, 2)), jnp.int32), CLASSES, 7
)
OF_CLASSES = classes.Weights(_normal(2, 7, D // 2), CLASS_CODES, None, _normal(NODES))
CLUSTERS = (adaptive.Cluster(_normal(4, D), _normal(200, 4)),)
ADAPTIVE = adaptive.AdaptiveWeights(_normal(101, D), None, CLUSTERS)
_SIZE = class_size(V)
TWO_LEVEL = TwoLevelWeights(_normal(-(-V // _SIZE), D), _normal(-(-V // _SIZE), _SIZE, D))
OWN = loss.Own(jnp.asarray([3, 5]), _normal(N, 2))

TERMS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "full": lambda t: softmax.nll(H, ROWS, t, BIAS)[0],
    "streamed": lambda t: softmax.streamed_nll(H, ROWS, t, BIAS)[0],
    "low rank": lambda t: low_rank.nll(H, _normal(4, D), ROWS[:, :4], t)[0],
    "adaptive": lambda t: adaptive.nll(H, ADAPTIVE, t),
    "two levels": lambda t: two_level.nll(H, TWO_LEVEL, t, V),
    "Huffman": lambda t: huffman.nll(H, ROWS[1:], PATHS, t),
    "one codebook": lambda t: closed_form.nll(H, CODEBOOKS[0], CODES[:, 0], t, BIAS)[0],
    "bilinear": lambda t: bilinear.nll(CODE_LOGITS[:2], CODES[:, :2], t, BIAS)[0],
    "three codebooks": lambda t: loss.nll(CODE_LOGITS, CODES, t, BIAS)[0],
    "own vectors": lambda t: loss.nll(CODE_LOGITS, CODES, t, BIAS, own=OWN)[0],
    "classes": lambda t: classes.nll(H, OF_CLASSES, CLASSES, t),
}
SUMS: dict[str, Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]] = {
    "full": lambda t, c: softmax.summed_nll(H, ROWS, t, c, BIAS),
    "resident": lambda t, c: resident.summed_nll(H, ROWS, t, c, BIAS),
    "one codebook": lambda t, c: closed_form.summed_nll(H, CODEBOOKS[0], CODES[:, 0], t, c, BIAS),
    "two codebooks": lambda t, c: loss.summed_nll(H, CODEBOOKS[:2], CODES[:, :2], t, c, BIAS),
    "two codebooks, no bias": lambda t, c: loss.summed_nll(H, CODEBOOKS[:2], CODES[:, :2], t, c),
    "classes": lambda t, c: (classes.summed_nll(H, OF_CLASSES, CLASSES, t, c),),
}
TOKENS = jnp.asarray([0, 17, V - 1, 123, 250])


@pytest.mark.parametrize("wrong", [IGNORE_ID, -1, V, 2**31 - 1])
@pytest.mark.parametrize("kind", TERMS)
def test_losses_of_no_token(kind: str, wrong: int) -> None:
    targets = TOKENS.at[1].set(wrong)
    with pytest.raises(UserError, match=f"hold {wrong}: must be in 0 .. {V - 1}"):
        TERMS[kind](targets)
    nll = jax.jit(TERMS[kind])
    expected = np.array(nll(TOKENS))
    assert np.isfinite(expected).all()
    expected[1] = np.nan
    np.testing.assert_array_equal(nll(targets), expected)


@pytest.mark.parametrize("wrong", [IGNORE_ID, -1, V, 2**31 - 1])
@pytest.mark.parametrize("kind", SUMS)
def test_sums_of_no_token(kind: str, wrong: int) -> None:
    targets, counts = TOKENS.at[1].set(wrong), jnp.arange(N) != 1
    with pytest.raises(UserError, match=f"hold {wrong}: must be in 0 .. {V - 1}"):
        SUMS[kind](targets, counts)
    sums = jax.jit(SUMS[kind])
    expected = sums(TOKENS, counts)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(sums(targets, counts), expected)
    assert np.isnan(sums(targets, jnp.ones(N, bool))).all()
