"""The nucleus of a codebook's tokens, against the one that V logits have."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from versions import oldest_jax

from vqcx_jax.ops import sampling
from vqcx_jax.ops.codebook import sampling as codebook_sampling
from vqcx_jax.ops.codebook.nucleus import nucleus
from vqcx_jax.ops.codebook.token_table import token_masses, token_table

pytestmark = oldest_jax

# V, K, codes that have tokens.
CASES = {
    "one code": (7, 1, 1),
    "one token a code": (31, 31, 31),
    "ragged": (1009, 37, 37),
    "empty codes": (300, 64, 20),
    "large": (50_257, 503, 503),
}


def make(case: str, whole_numbers: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Code logits, assignment and bias. Whole numbers make many ties."""
    vocab_size, num_codes, num_used = CASES[case]
    rng = np.random.default_rng(0)
    used = rng.permutation(num_codes)[:num_used]
    more = rng.choice(used, vocab_size - num_used, p=rng.dirichlet(np.full(num_used, 2.0)))
    assignment = rng.permutation(np.concatenate([used, more]))
    code_logits, bias = rng.normal(0, 2, (3, 4, num_codes)), rng.normal(0, 2, vocab_size)
    if whole_numbers:
        code_logits, bias = np.round(code_logits), np.round(bias)
    return jnp.float32(code_logits), jnp.int32(assignment), jnp.float32(bias)


@jax.jit
def both(
    code_logits: jax.Array, assignment: jax.Array, bias: jax.Array, top_p: Any, temperature: Any
) -> tuple[jax.Array, jax.Array]:
    """Which tokens are in the nucleus: by codes, and by V logits."""
    table = token_table(assignment, code_logits.shape[-1], bias)
    counts = nucleus(code_logits, table, token_masses(table, temperature), temperature, top_p)
    rank_V = jnp.arange(len(bias)) - table.starts[table.codes]
    by_place = rank_V < counts[..., table.codes]
    by_codes = jnp.zeros_like(by_place).at[..., table.tokens].set(by_place)
    z = (code_logits[..., assignment] + bias) / temperature
    return by_codes, sampling.nucleus(z, top_p) > -jnp.inf


@pytest.mark.parametrize("whole_numbers", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_is_that_of_v_logits(case: str, whole_numbers: bool) -> None:
    arrays = make(case, whole_numbers)
    sizes = set()
    for top_p in (1e-6, 0.1, 0.5, 0.9, 0.99, 1.0):
        for temperature in (0.3, 1.0, 3.0):
            by_codes, by_logits = both(*arrays, top_p, jnp.float32(temperature))
            np.testing.assert_array_equal(by_codes, by_logits)
            sizes.add(int(by_codes.sum()))
    assert len(sizes) > 2  # Not always the same ones.


def test_tokens_without_probability_are_outside() -> None:
    """Biases of -inf, alone in a code and beside others; and logits of either sign and zero."""
    code_logits = jnp.asarray([0.0, -0.0, 1e-40, -3.0, 5.0])
    assignment = jnp.asarray([0, 1, 2, 3, 4, 0, 3])
    bias = jnp.asarray([0.0, -0.0, 0.0, 0.0, -jnp.inf, -jnp.inf, -1e-30])
    for top_p in (0.2, 0.9, 0.999):
        by_codes, by_logits = both(code_logits, assignment, bias, top_p, jnp.float32(1))
        np.testing.assert_array_equal(by_codes, by_logits)
        assert not np.any(by_codes[jnp.isinf(bias)])


def test_draws_without_v_logits() -> None:
    """Of 1,000 positions and a million tokens in 1,000 codes, V logits would be 4 GB."""

    def draw(code_logits: jax.Array, assignment: jax.Array, key: jax.Array) -> jax.Array:
        table = token_table(assignment, code_logits.shape[-1])
        return codebook_sampling.sampler(table, 0.8, top_p=0.9)(code_logits, key)

    arguments = (
        jax.ShapeDtypeStruct((1000, 1000), jnp.float32),
        jax.ShapeDtypeStruct((1_000_000,), jnp.int32),
        jax.random.key(0),
    )
    memory = jax.jit(draw).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4e9 / 40
