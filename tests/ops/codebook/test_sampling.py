"""Top-k and draws from code logits, against the V logits that they stand for."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from drawn import assert_drawn_from
from versions import oldest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops.codebook import sampling

pytestmark = oldest_jax

DRAWS = 50_000

# Compiled once for all tests of a shape.
token_table = jax.jit(sampling.token_table, static_argnums=1)
top_k = jax.jit(sampling.top_k, static_argnums=2)


@jax.jit
def draws(
    table: sampling.TokenTable, temperature: float, code_logits: jax.Array, key: jax.Array
) -> jax.Array:
    return sampling.sampler(table, temperature)(code_logits, key)


class Case(NamedTuple):
    vocab_size: int
    num_codes: int
    used_codes: int | None = None  # None: all of them; else the others stay empty.
    has_bias: bool = True


CASES = {
    "one_code": Case(7, 1),
    "one_token_a_code": Case(31, 31),
    "ragged": Case(1009, 37),
    "ragged_no_bias": Case(1009, 37, has_bias=False),
    "empty_codes": Case(300, 64, used_codes=20),
    "empty_codes_no_bias": Case(300, 64, used_codes=20, has_bias=False),
}
LARGE = Case(50_257, 503)


class Inputs(NamedTuple):
    code_logits: jax.Array
    assignment: jax.Array
    bias: jax.Array | None

    def table(self) -> sampling.TokenTable:
        return token_table(self.assignment, self.code_logits.shape[-1], self.bias)

    def logits(self) -> np.ndarray:
        z = self.code_logits[..., self.assignment]
        return np.asarray(z if self.bias is None else z + self.bias)


def make(case: Case, leading: tuple[int, ...] = (2, 3), whole_numbers: bool = False) -> Inputs:
    """Whole numbers make many ties, within codes and among them, without any rounding."""
    rng = np.random.default_rng(0)
    used = rng.permutation(case.num_codes)[: case.used_codes]
    # Ragged: the number of tokens of a code varies tenfold.
    weights = rng.uniform(1, 10, len(used))
    more = rng.choice(used, case.vocab_size - len(used), p=weights / weights.sum())
    assignment = rng.permutation(np.concatenate([used, more]))
    code_logits = 2 * rng.standard_normal((*leading, case.num_codes))
    bias = rng.standard_normal(case.vocab_size) if case.has_bias else None
    if whole_numbers:
        code_logits, bias = (None if x is None else np.round(x) + 0.0 for x in (code_logits, bias))
    return Inputs(
        jnp.asarray(code_logits, jnp.float32),
        jnp.asarray(assignment, jnp.int32),
        None if bias is None else jnp.asarray(bias, jnp.float32),
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_token_table(case: Case) -> None:
    inputs = make(case, whole_numbers=True)
    assignment, table = np.asarray(inputs.assignment), inputs.table()
    bias = np.zeros(case.vocab_size) if inputs.bias is None else np.asarray(inputs.bias)
    tokens = np.lexsort((np.arange(case.vocab_size), -bias, assignment))
    np.testing.assert_array_equal(table.tokens, tokens)
    np.testing.assert_array_equal(table.codes, assignment[tokens])
    np.testing.assert_array_equal(table.bias, bias[tokens])
    np.testing.assert_array_equal(table.counts, np.bincount(assignment, minlength=case.num_codes))
    for code, (start, count) in enumerate(zip(table.starts, table.counts, strict=True)):
        members = np.flatnonzero(assignment == code)
        assert sorted(tokens[start : start + count]) == members.tolist()
        assert table.best_bias[code] == (bias[members].max() if count else -np.inf)
    used = [code for code in np.asarray(table.by_first_token) if table.counts[code]]
    assert np.all(np.diff(tokens[table.starts[np.asarray(used)]]) > 0)


@pytest.mark.parametrize("whole_numbers", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_top_k_is_that_of_the_v_logits(case: Case, whole_numbers: bool) -> None:
    inputs = make(case, (8, 5), whole_numbers)
    # 17: more than some codes have tokens; V: all of them, which the last branch sorts.
    for k in {min(k, case.vocab_size) for k in (1, 17, case.vocab_size)}:
        z, tokens = jax.jit(sampling.top_k, static_argnums=2)(inputs.code_logits, inputs.table(), k)
        chex.assert_shape((z, tokens), (8, 5, k))
        expected_z, expected_tokens = jax.lax.top_k(jnp.asarray(inputs.logits()), k)
        np.testing.assert_array_equal(z, expected_z)
        np.testing.assert_array_equal(tokens, expected_tokens)


@pytest.mark.parametrize("whole_numbers", [True, False])
def test_top_k_of_a_large_vocabulary(whole_numbers: bool) -> None:
    inputs = make(LARGE, (64,), whole_numbers)
    for k in (1, 50, 300):
        z, tokens = jax.jit(sampling.top_k, static_argnums=2)(inputs.code_logits, inputs.table(), k)
        expected_z, expected_tokens = jax.lax.top_k(jnp.asarray(inputs.logits()), k)
        np.testing.assert_array_equal(z, expected_z)
        np.testing.assert_array_equal(tokens, expected_tokens)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_all_equal(k: int) -> None:
    """As in a model that has not been trained: the lowest ids, whatever their codes."""
    inputs = make(CASES["empty_codes_no_bias"])
    _, tokens = top_k(jnp.zeros_like(inputs.code_logits), inputs.table(), k)
    np.testing.assert_array_equal(tokens, np.broadcast_to(np.arange(k), tokens.shape))


def test_biases_that_rounding_makes_equal() -> None:
    """The one place where `jax.lax.top_k` would take another token, the lowest."""
    table = token_table(jnp.zeros((3,), jnp.int32), 1, jnp.asarray([0.0, 0.25, -9.0]))
    code_logits = jnp.asarray([2.0**24])
    assert top_k(code_logits, table, 1)[1].tolist() == [1]
    assert top_k(code_logits, table, 2)[1].tolist() == [0, 1]


def test_gradient_of_top_k() -> None:
    inputs = make(CASES["ragged"], (4,))
    table = inputs.table()
    gradient = jax.grad(lambda l: jnp.sum(sampling.top_k(l, table, 5)[0]))(inputs.code_logits)
    _, tokens = sampling.top_k(inputs.code_logits, table, 5)
    expected = np.zeros(gradient.shape)
    for row, codes in enumerate(np.asarray(inputs.assignment)[np.asarray(tokens)]):
        np.add.at(expected[row], codes, 1)
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("k", [0, 8])
def test_top_k_out_of_range(k: int) -> None:
    inputs = make(CASES["one_code"])
    with pytest.raises(UserError, match=f"top_k={k}: must be in 1 .. 7"):
        sampling.top_k(inputs.code_logits, inputs.table(), k)


def draw(
    code_logits: jax.Array,
    table: sampling.TokenTable,
    count: int,
    temperature: float,
    seed: int = 0,
) -> np.ndarray:
    rows = jnp.broadcast_to(code_logits, (count, *code_logits.shape))
    tokens = draws(table, temperature, rows, jax.random.key(seed))
    chex.assert_shape(tokens, (count,))
    chex.assert_type(tokens, jnp.int32)
    return np.asarray(tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_draws(case: Case, temperature: float) -> None:
    inputs = make(case, ())
    tokens = draw(inputs.code_logits, inputs.table(), DRAWS, temperature)
    probabilities = scipy.special.softmax(np.float64(inputs.logits()) / temperature)
    assert_drawn_from(np.bincount(tokens, minlength=case.vocab_size), probabilities)


def test_draws_of_a_large_vocabulary() -> None:
    inputs = make(LARGE, ())
    tokens = draw(inputs.code_logits, inputs.table(), 50_000, 1.0)
    probabilities = scipy.special.softmax(np.float64(inputs.logits()))
    # Most tokens are too rare to be tested alone: in groups of ids, and by code.
    for group in (np.arange(LARGE.vocab_size) % 499, np.asarray(inputs.assignment)):
        counts = np.bincount(group[tokens], minlength=group.max() + 1)
        assert_drawn_from(counts, np.bincount(group, probabilities))


@pytest.mark.parametrize("name", ["ragged", "empty_codes_no_bias"])
def test_temperature_0_is_the_argmax_of_the_v_logits(name: str) -> None:
    inputs = make(CASES[name], (40,), whole_numbers=True)
    table = inputs.table()
    expected = np.argmax(inputs.logits(), axis=-1)
    for seed in range(2):
        tokens = draws(table, 0.0, inputs.code_logits, jax.random.key(seed))
        np.testing.assert_array_equal(tokens, expected)


def test_a_tiny_temperature_is_greedy() -> None:
    inputs = make(CASES["ragged"], ())
    tokens = draw(inputs.code_logits, inputs.table(), DRAWS, 1e-38)
    assert set(tokens.tolist()) == {int(np.argmax(inputs.logits()))}


def test_same_key_same_tokens() -> None:
    inputs = make(CASES["ragged"], ())
    first, again, other = (
        draw(inputs.code_logits, inputs.table(), DRAWS, 1.0, seed).tolist() for seed in (0, 0, 1)
    )
    assert first == again != other


def test_sums_of_one_code_do_not_drown_in_those_of_others() -> None:
    """2^18 equal tokens come first: a running sum over all would step by 1/32 from there on."""
    assignment = jnp.zeros((2**18 + 2,), jnp.int32).at[-2:].set(1)
    bias = jnp.zeros(assignment.shape).at[-1].set(-np.log(64))
    table = token_table(assignment, 2, bias)
    tokens = draw(jnp.asarray([0.0, 100.0]), table, 50_000, 1.0)
    counts = np.bincount(tokens, minlength=len(assignment))[-2:]
    assert counts.sum() == 50_000
    assert_drawn_from(counts, np.array([64, 1]) / 65)


def test_range_of_biases() -> None:
    """Code 0 has only biases of -1000, code 1 one of them, which underflows beside the other."""
    table = token_table(jnp.asarray([0, 1, 0, 1]), 2, jnp.asarray([-1000.0, -1000.0, -1000.0, 0.0]))
    tokens = draw(jnp.asarray([1000.0, 0.0]), table, 20_000, 1.0)
    assert_drawn_from(np.bincount(tokens, minlength=4), np.array([1, 0, 1, 1]) / 3)


def test_one_position_a_key() -> None:
    """As in generation: noise of the code and of the token must not come from the same bits."""
    table = token_table(jnp.arange(8) // 4, 2)
    keys = jax.random.split(jax.random.key(0), DRAWS)
    tokens = jax.vmap(draws, (None, None, None, 0))(table, 1.0, jnp.zeros((1, 2)), keys)
    assert_drawn_from(np.bincount(tokens.ravel(), minlength=8), np.full(8, 1 / 8))


def test_a_code_of_no_probability_is_never_drawn() -> None:
    """Codes 1 and 2 have biases of -inf alone, code 3 has no token."""
    bias = jnp.asarray([0.0, -np.inf, -np.inf, 0.0, -np.inf])
    table = token_table(jnp.asarray([0, 1, 1, 0, 2]), 4, bias)
    code_logits = jnp.asarray([0.0, 50.0, 50.0, 50.0])
    tokens = draw(code_logits, table, 1000, 1.0)
    assert set(tokens.tolist()) == {0, 3}
    assert top_k(code_logits, table, 4)[1].tolist() == [0, 3, 1, 2]


def test_a_token_of_no_probability_is_never_drawn() -> None:
    rng = np.random.default_rng(0)
    bias = jnp.asarray(np.concatenate([rng.standard_normal(1000), np.full(1000, -np.inf)]))
    assignment = jnp.zeros((2000,), jnp.int32)
    tokens = draw(jnp.zeros((1,)), token_table(assignment, 1, bias), 100_000, 1.0)
    assert tokens.max() < 1000


def test_no_v_logits_are_made() -> None:
    """512 positions, and no array that is near 512 * 50,257."""
    inputs = make(LARGE, (512,))

    def largest(function: Any, *arguments: Any) -> int:
        jaxpr = jax.make_jaxpr(function)(*arguments)
        return max(var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars)

    table = inputs.table()
    for function in (
        lambda l, table: sampling.top_k(l, table, 50),
        lambda l, table: sampling.sampler(table)(l, jax.random.key(0)),
    ):
        assert largest(function, inputs.code_logits, table) < 512 * 50_257 / 10
