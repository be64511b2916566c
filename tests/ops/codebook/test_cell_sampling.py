"""Draws from the code logits of two codebooks, against the V logits that they stand for."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from drawn import assert_drawn_from
from versions import oldest_jax

from vqcx_jax.ops.codebook import cell_sampling
from vqcx_jax.ops.codebook.cell_sampling import cell_sampler

pytestmark = oldest_jax


class Cells(NamedTuple):
    """Inputs of `cell_sampler` for one position or several."""

    code_logits: tuple[jax.Array, ...]
    assignment: jax.Array
    bias: jax.Array
    own_tokens: jax.Array | None
    own_logits: jax.Array | None  # With biases.

    def num_codes(self) -> tuple[int, ...]:
        return tuple(l.shape[-1] for l in self.code_logits)

    def logits(self) -> np.ndarray:
        columns = enumerate(self.code_logits)
        z = sum(np.asarray(l)[..., self.assignment[:, m]] for m, l in columns) + self.bias
        if self.own_tokens is not None:
            z = z.at[..., self.own_tokens].set(self.own_logits)
        return np.asarray(z)


def make_cells(
    num_codes: tuple[int, ...],
    own: int = 0,
    banned: int = 0,
    leading: tuple[int, ...] = (),
    whole_numbers: bool = False,
) -> Cells:
    """1009 tokens, of which some have own logits and others a bias of -inf."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        x = 2 * rng.standard_normal(shape)
        return np.float32(np.round(x) + 0.0 if whole_numbers else x)

    assignment = np.stack([rng.integers(k, size=1009) for k in num_codes], axis=1)
    bias = normal(1009)
    tokens = rng.permutation(1009)
    # Whole cells are banned too.
    bias[np.isin(assignment[:, 0], [0, 1]) & (assignment[:, -1] < 3)] = -np.inf
    bias[tokens[own : own + banned]] = -np.inf
    return Cells(
        tuple(jnp.asarray(normal(*leading, k)) for k in num_codes),
        jnp.asarray(assignment, jnp.int32),
        jnp.asarray(bias),
        jnp.asarray(tokens[:own], jnp.int32) if own else None,
        jnp.asarray(1 + normal(*leading, own)) if own else None,
    )


CELLS: dict[str, dict[str, Any]] = {
    "many_tokens_a_cell": {"num_codes": (5, 4), "banned": 100},
    "most_cells_empty": {"num_codes": (50, 64)},
    "one_codebook": {"num_codes": (37,), "own": 20},
    "own": {"num_codes": (20, 37), "own": 20, "banned": 300},
}


def draw_cells(cells: Cells, temperature: float, key: jax.Array) -> jax.Array:
    draw = cell_sampler(
        cells.assignment, cells.num_codes(), cells.bias, cells.own_tokens, temperature
    )
    return draw(cells.code_logits, cells.own_logits, key)


cell_draws = jax.jit(draw_cells)


def repeat(cells: Cells, count: int) -> Cells:
    """Many positions, each with the code logits of the one given."""

    def repeat(x: Any) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), x)

    return cells._replace(
        code_logits=repeat(cells.code_logits), own_logits=repeat(cells.own_logits)
    )


def draw_from_cells(cells: Cells, count: int, temperature: float, seed: int = 0) -> np.ndarray:
    tokens = cell_draws(repeat(cells, count), temperature, jax.random.key(seed))
    chex.assert_shape(tokens, (count,))
    chex.assert_type(tokens, jnp.int32)
    return np.asarray(tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", CELLS)
def test_draws_from_cells(name: str, temperature: float) -> None:
    cells = make_cells(**CELLS[name])
    tokens = draw_from_cells(cells, 10_000, temperature)
    probabilities = scipy.special.softmax(np.float64(cells.logits()) / temperature)
    assert (probabilities == 0).any()
    assert_drawn_from(np.bincount(tokens, minlength=1009), probabilities)


@pytest.mark.parametrize("name", CELLS)
def test_by_product_and_by_cells(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers give the same tokens but for roundings."""
    rows = repeat(make_cells(**CELLS[name]), 10_000)
    key = jax.random.key(0)

    def tokens(least_z: float) -> np.ndarray:
        monkeypatch.setattr(cell_sampling, "least_z", lambda _: least_z)
        return np.asarray(jax.jit(lambda *x: draw_cells(*x))(rows, 1.0, key))

    by_product, by_cells = tokens(0.0), tokens(np.inf)
    assert np.mean(by_product != by_cells) < 1e-3
    assert len(set(by_cells)) > 20


@pytest.mark.parametrize("name", CELLS)
def test_ordinary_logits_need_no_exponentials_of_cells(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def useless(cells: Any, l1: jax.Array, l2: jax.Array, own_logits: Any) -> Any:
        extra = 0 if own_logits is None else own_logits.shape[-1]
        i, j = l1.shape[-1], l2.shape[-1]
        return jnp.full((*l1.shape[:-1], i + extra), jnp.nan), jnp.zeros((*l1.shape[:-1], i, j))

    rows, key = repeat(make_cells(**CELLS[name]), 100), jax.random.key(0)
    expected = cell_draws(rows, 1.0, key)
    monkeypatch.setattr(cell_sampling, "_by_cells", useless)
    np.testing.assert_array_equal(jax.jit(lambda *x: draw_cells(*x))(rows, 1.0, key), expected)
    is_used = jax.jit(lambda *x: draw_cells(*x))(rows, 0.01, key) != cell_draws(rows, 0.01, key)
    assert jnp.any(is_used)


@pytest.mark.parametrize("name", CELLS)
def test_temperature_0_of_cells_is_the_argmax_of_the_v_logits(name: str) -> None:
    for whole_numbers in (True, False):
        cells = make_cells(**CELLS[name], leading=(4, 10), whole_numbers=whole_numbers)
        tokens = cell_draws(cells, 0.0, jax.random.key(0))
        np.testing.assert_array_equal(tokens, np.argmax(cells.logits(), axis=-1))


@pytest.mark.parametrize("name", CELLS)
def test_a_tiny_temperature_of_cells_is_greedy(name: str) -> None:
    cells = make_cells(**CELLS[name])
    tokens = draw_from_cells(cells, 10_000, 1e-38)
    assert set(tokens.tolist()) == {int(np.argmax(cells.logits()))}


def test_best_codes_without_a_token() -> None:
    """Code i of one codebook meets only code i of the other, 2000 below the best pair."""
    cells = Cells(
        (jnp.asarray([0.0, -1000.0, -2000.0]), jnp.asarray([-2000.0, -1000.0, 0.0])),
        jnp.asarray([[0, 0], [1, 1], [2, 2], [2, 2]], jnp.int32),
        jnp.asarray([0.0, 0.0, 0.0, -jnp.inf]),
        None,
        None,
    )
    tokens = draw_from_cells(cells, 10_000, 1.0)
    assert_drawn_from(np.bincount(tokens, minlength=4), np.array([1, 1, 1, 0]) / 3)


def test_noise_of_cells_is_independent() -> None:
    """Row, column and token of one position, over many keys."""
    codes = np.arange(32)
    assignment = jnp.asarray(np.stack([codes // 16, codes // 4 % 4], axis=1), jnp.int32)
    cells = Cells((jnp.zeros((1, 2)), jnp.zeros((1, 4))), assignment, jnp.zeros((32,)), None, None)
    keys = jax.random.split(jax.random.key(0), 10_000)
    tokens = jax.vmap(cell_draws, (None, None, 0))(cells, 1.0, keys)
    assert_drawn_from(np.bincount(tokens.ravel(), minlength=32), np.full(32, 1 / 32))


def test_own_tokens_far_above_all_cells() -> None:
    """By more than float32 can say at this temperature."""
    cells = make_cells((20, 37), own=20)
    cells = cells._replace(own_logits=jnp.full((20,), 3e30))
    tokens = draw_from_cells(cells, 10_000, 1e-9)
    counts = np.bincount(tokens, minlength=1009)[np.asarray(cells.own_tokens)]
    assert_drawn_from(counts, np.full(20, 1 / 20))


def test_only_own_tokens_can_be() -> None:
    cells = make_cells((20, 37), own=1009)
    tokens = draw_from_cells(cells, 10_000, 1.0)
    probabilities = scipy.special.softmax(np.float64(cells.logits()))
    assert_drawn_from(np.bincount(tokens, minlength=1009), probabilities)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_some_token(temperature: float) -> None:
    """And other positions have theirs."""
    cells = make_cells((20, 37), own=20)
    rows = repeat(cells, 100)
    l1, l2 = rows.code_logits
    rows = rows._replace(code_logits=(l1.at[0, 3].set(jnp.nan), l2))
    tokens = cell_draws(rows, temperature, jax.random.key(0))
    assert 0 <= tokens[0] < 1009
    expected = cell_draws(repeat(cells, 100), temperature, jax.random.key(0))
    assert np.mean(tokens[1:] == expected[1:]) > 0.95
