"""Codes that follow statistics of hidden states: the sums, and one step of Lloyd's algorithm."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops.codebook.reassign import Statistics, observe, reassign, update

FORMS = ("product", "additive")
MIN_COUNT = 2.0


def statistics_of(means_VxD: Any, counts_V: Any) -> Statistics:
    """Statistics whose centred means are `means_VxD`, if their weighted sum is 0."""
    sums = np.asarray(means_VxD) * np.asarray(counts_V)[:, None]
    return Statistics(jnp.asarray(sums, jnp.float32), jnp.asarray(counts_V, jnp.float32))


def planted(form: str, num_codebooks: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Centred means (60, 12) that are exact sums or slices of 4 codes, and those codes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(4, size=(60, num_codebooks))
    width = 12 // num_codebooks if form == "product" else 12
    books = rng.standard_normal((num_codebooks, 4, width))
    parts = [book[codes[:, m]] for m, book in enumerate(books)]
    means = np.concatenate(parts, axis=1) if form == "product" else np.sum(parts, axis=0)
    return means - means.mean(axis=0), codes


def disturbed(codes: np.ndarray, tokens: int, seed: int = 1) -> np.ndarray:
    """Other codes for the first tokens."""
    wrong = codes.copy()
    wrong[:tokens] += np.random.default_rng(seed).integers(1, 4, size=wrong[:tokens].shape)
    return wrong % 4


def reference(
    statistics: Statistics, assignment: Any, num_codes: int, form: str, **options: Any
) -> np.ndarray:
    """`reassign` in float64, token by token."""
    sums, counts = (np.asarray(x, np.float64) for x in statistics)
    means = sums / np.maximum(counts, 1e-30)[:, None] - sums.sum(axis=0) / counts.sum()
    if options.get("directions"):
        means /= np.linalg.norm(means, axis=1, keepdims=True)
    is_fixed = options.get("is_fixed")
    counts = counts if is_fixed is None else np.where(is_fixed, 0.0, counts)
    codes = np.array(assignment)
    num_codebooks, min_count = codes.shape[1], options["min_count"]
    y: dict[tuple[int, int], Any] = {}

    def part(v: int, m: int) -> Any:
        if form == "product":
            return np.split(means[v], num_codebooks)[m]
        others = [j for j in range(num_codebooks) if j != m]
        return means[v] - sum(y.get((j, codes[v, j]), 0.0) for j in others)

    def fit(m: int) -> None:
        for k in range(num_codes):
            tokens = [v for v in range(len(codes)) if codes[v, m] == k and counts[v] > 0]
            if tokens:
                parts = [part(v, m) for v in tokens]
                y[m, k] = np.average(parts, axis=0, weights=counts[tokens])

    for _ in range(10 if form == "additive" else 0):
        for m in range(num_codebooks):
            fit(m)
    for m in range(num_codebooks):
        fit(m)
        weight = [counts[codes[:, m] == k].sum() for k in range(num_codes)]
        open_codes = [k for k in range(num_codes) if weight[k] >= min_count]
        moved = codes[:, m].copy()
        for v in np.flatnonzero(counts >= min_count):
            distance = {k: np.sum((part(v, m) - y[m, k]) ** 2) for k in open_codes}
            moved[v] = min(open_codes, key=lambda k: distance[k])
        codes[:, m] = moved
    return codes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("directions", [False, True])
@pytest.mark.parametrize(("vocab_size", "num_codebooks", "num_codes"), [(37, 3, 5), (50, 1, 7)])
def test_reference(
    form: Any, directions: bool, vocab_size: int, num_codebooks: int, num_codes: int
) -> None:
    rng = np.random.default_rng(vocab_size)
    counts = rng.integers(0, 6, vocab_size) * 0.75
    means = rng.standard_normal((vocab_size, 6)) + 1.0
    statistics = statistics_of(means, counts)
    # The last code is empty.
    assignment = rng.integers(num_codes - 1, size=(vocab_size, num_codebooks))
    options = {
        "min_count": MIN_COUNT,
        "directions": directions,
        "is_fixed": rng.random(vocab_size) < 0.1,
    }
    actual = jax.jit(lambda s, a: reassign(s, a, num_codes, form, **options))(
        statistics, jnp.asarray(assignment)
    )
    expected = reference(statistics, assignment, num_codes, form, **options)
    assert actual.dtype == jnp.int32
    np.testing.assert_array_equal(actual, expected)
    assert (expected != assignment).sum() > vocab_size // 4
    kept = options["is_fixed"] | (counts < MIN_COUNT)
    assert 0 < kept.sum() < vocab_size
    np.testing.assert_array_equal(np.asarray(actual)[kept], assignment[kept])
    assert not np.any(np.asarray(actual) == num_codes - 1)


@pytest.mark.parametrize(("form", "num_codebooks"), [("product", 3), ("additive", 2)])
def test_planted_codes_are_found_again(form: Any, num_codebooks: int) -> None:
    # As in all of Lloyd's algorithm, from too far away it ends elsewhere.
    means, codes = planted(form, num_codebooks, seed=1)
    statistics = statistics_of(means, np.full(60, 5))
    assignment = jnp.asarray(disturbed(codes, 6))
    for _ in range(4):
        assignment = reassign(statistics, assignment, 4, form, min_count=MIN_COUNT)
    np.testing.assert_array_equal(assignment, codes)


@pytest.mark.parametrize(("form", "num_codebooks"), [("product", 3), ("additive", 2)])
def test_nobody_moves_at_a_fixed_point(form: Any, num_codebooks: int) -> None:
    means, codes = planted(form, num_codebooks)
    statistics = statistics_of(means, np.full(60, 5))
    found = reassign(statistics, jnp.asarray(codes), 4, form, min_count=MIN_COUNT)
    np.testing.assert_array_equal(found, codes)


def test_rare_tokens_and_own_tokens_keep_their_codes() -> None:
    means, codes = planted("product", 3)
    wrong = disturbed(codes, 12)
    counts = np.full(60, 5.0)
    counts[:4] = MIN_COUNT * 0.99
    counts[4] = 0.0
    statistics = statistics_of(means, counts)
    is_fixed = jnp.arange(60) == 7
    options = {"min_count": MIN_COUNT, "is_fixed": is_fixed}
    found = np.asarray(reassign(statistics, jnp.asarray(wrong), 4, "product", **options))
    kept = [0, 1, 2, 3, 4, 7]
    np.testing.assert_array_equal(found[kept], wrong[kept])
    assert np.any(found[5:7] != wrong[5:7])


def test_with_scales_only_directions_matter() -> None:
    """Four rays; tokens of the second and fourth are long, some of the others as well."""
    rays = np.asarray([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0], [-0.8, -0.6]])
    codes = np.arange(60) % 4
    lengths = np.where(codes % 2 == 1, 4.0, np.where(np.arange(60) < 30, 4.0, 0.5))
    # Few of the long ones: all sums are of one length, and the centre is 0.
    statistics = statistics_of(rays[codes] * lengths[:, None], 20 / lengths)
    assignment = jnp.asarray(codes[:, None])
    options = {"min_count": MIN_COUNT}
    found = reassign(statistics, assignment, 4, "product", directions=True, **options)
    np.testing.assert_array_equal(found, assignment)
    assert np.any(reassign(statistics, assignment, 4, "product", **options) != assignment)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.standard_normal((3, 7, 5)), dtype)
    targets = rng.integers(11, size=(3, 7))
    targets[0, 0] = -100
    is_token = rng.random((3, 7)) < 0.7
    is_token[0, 0] = True
    actual = jax.jit(observe, static_argnums=3)(h, jnp.asarray(targets), is_token, 11)
    sums, counts = np.zeros((11, 5)), np.zeros(11)
    for row, target, counted in zip(
        np.asarray(h, np.float64).reshape(-1, 5), targets.ravel(), is_token.ravel(), strict=True
    ):
        if counted and target >= 0:
            sums[target] += row
            counts[target] += 1
    assert actual.sums.dtype == actual.counts.dtype == jnp.float32
    np.testing.assert_allclose(actual.sums, sums, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(actual.counts, counts)


def test_many_bfloat16_states_are_summed_exactly() -> None:
    """In bfloat16, 256 + 1 is 256."""
    h, targets = jnp.ones((1, 600, 2), jnp.bfloat16), jnp.zeros((1, 600), jnp.int32)
    statistics = observe(h, targets, jnp.ones((1, 600), bool), 3)
    np.testing.assert_array_equal(statistics.sums, [[600, 600], [0, 0], [0, 0]])


def test_old_batches_are_forgotten() -> None:
    rng = np.random.default_rng(0)
    batches = [
        Statistics(*(jnp.asarray(rng.random(shape), jnp.float32) for shape in [(4, 3), (4,)]))
        for _ in range(3)
    ]
    statistics = Statistics(jnp.zeros((4, 3)), jnp.zeros(4))
    for batch in batches:
        statistics = update(statistics, batch, 0.5)
    for actual, first, second, third in zip(statistics, *batches, strict=True):
        np.testing.assert_allclose(actual, 0.25 * first + 0.5 * second + third, rtol=1e-6)
