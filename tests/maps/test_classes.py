"""Classes: equal sizes, tokens of one direction together, and codes that fit them."""

import itertools

import numpy as np
import pytest

from vqcx_jax.maps import TokenClasses, TokenMap
from vqcx_jax.maps.classes import near_classes, random_classes
from vqcx_jax.maps.fixed import by_frequency, random_map

RNG = np.random.default_rng(0)
V, M, K, D = 61, 2, 6, 8
COUNTS = RNG.permutation(V)
WEIGHTS = np.maximum(COUNTS, 1) ** 0.5
ORDER = by_frequency(COUNTS)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CODEBOOKS = (floats(K, D // M), floats(K, D // M))
SCALED = TokenMap(
    random_map(V, K, 0, M), (K,) * M, CODEBOOKS, scale=np.exp(2 * floats(V)).astype(np.float32)
)
PLAIN = TokenMap(SCALED.codes, SCALED.num_codes, CODEBOOKS)


def near(token_map: TokenMap, num_classes: int, num_frequent: int, seed: int = 0) -> TokenClasses:
    return near_classes(
        token_map, WEIGHTS, num_classes, num_frequent, frequency_order=ORDER, seed=seed
    )


def at_random(num_classes: int, num_frequent: int, seed: int = 0) -> TokenClasses:
    return random_classes(
        COUNTS, num_classes, num_frequent, num_codes=K, num_codebooks=M, seed=seed
    )


def rows(token_map: TokenMap) -> np.ndarray:
    vectors = np.concatenate([CODEBOOKS[m][token_map.codes[:, m]] for m in range(M)], axis=1)
    return vectors if token_map.scale is None else vectors * token_map.scale[:, None]


@pytest.mark.parametrize("num_frequent", [0, 10])
@pytest.mark.parametrize("num_classes", [1, 7, 20, 51])
@pytest.mark.parametrize("make", ["random", "scaled", "plain"])
def test_sizes(make: str, num_classes: int, num_frequent: int) -> None:
    if make == "random":
        classes = at_random(num_classes, num_frequent)
    else:
        classes = near({"scaled": SCALED, "plain": PLAIN}[make], num_classes, num_frequent)
    assert classes.of_token.dtype == classes.codes.dtype == np.int32
    assert set(np.flatnonzero(classes.of_token < 0)) == set(ORDER[:num_frequent])
    sizes = np.bincount(classes.of_token[ORDER[num_frequent:]], minlength=num_classes)
    assert len(sizes) == num_classes and sizes.min() >= 1
    assert sizes.max() <= -(-(V - num_frequent) // num_classes)
    assert classes.codes.shape == (num_classes, M)
    assert (classes.scale is not None) == (make == "scaled")
    # It is what a map takes.
    scale = SCALED.scale if make == "scaled" else None
    TokenMap(SCALED.codes, SCALED.num_codes, CODEBOOKS, scale=scale, classes=classes)


@pytest.mark.parametrize("scaled", [True, False])
def test_tokens_of_one_direction_share_a_class(scaled: bool) -> None:
    """Five directions, told apart by nothing else: lengths differ by factors of 100."""
    directions = np.concatenate(CODEBOOKS, axis=1)[:5]
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    codebooks = tuple(
        np.split(np.concatenate(CODEBOOKS, axis=1)[:5] / lengths, M, axis=1)
    )  # Sums of slices have length 1, as those of a quantised direction.
    direction_of = np.random.default_rng(1).permutation(np.arange(60) % 5).astype(np.int32)
    token_map = TokenMap(
        np.stack([direction_of] * M, axis=1),
        (5, 5),
        codebooks,
        scale=(10 ** RNG.uniform(-1, 1, 60)).astype(np.float32) if scaled else None,
    )
    weights = RNG.uniform(1, 9, 60)
    classes = near_classes(token_map, weights, 5, 0, frequency_order=np.arange(60), seed=0)
    for class_ in range(5):
        members = classes.of_token == class_
        (direction,) = set(direction_of[members])
        assert np.sum(members) == 12
        assert classes.codes[class_].tolist() == [direction, direction]
        if token_map.scale is not None:
            assert classes.scale is not None
            expected = np.average(token_map.scale[members], weights=weights[members])
            assert classes.scale[class_] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("token_map", [SCALED, PLAIN], ids=["scaled", "plain"])
def test_codes_are_the_nearest_and_the_scale_is_a_length(token_map: TokenMap) -> None:
    classes = near(token_map, 9, 10)
    tuples = np.asarray(list(itertools.product(range(K), repeat=M)))
    vectors = np.concatenate([CODEBOOKS[m][tuples[:, m]] for m in range(M)], axis=1)
    for class_ in range(9):
        members = classes.of_token == class_
        mean = np.average(rows(token_map)[members], axis=0, weights=WEIGHTS[members])
        if token_map.scale is not None:
            assert classes.scale is not None
            assert classes.scale[class_] == pytest.approx(np.linalg.norm(mean), rel=1e-4)
            mean /= np.linalg.norm(mean)
        nearest = tuples[np.argmin(np.sum((vectors - mean) ** 2, axis=1))]
        np.testing.assert_array_equal(classes.codes[class_], nearest)


def test_classes_are_nearer_than_random_ones() -> None:
    directions = rows(PLAIN) / np.linalg.norm(rows(PLAIN), axis=1, keepdims=True)

    def error(classes: TokenClasses) -> float:
        parts = [directions[classes.of_token == c] for c in range(9)]
        return sum(float(np.sum((part - part.mean(axis=0)) ** 2)) for part in parts)

    assert error(near(PLAIN, 9, 10)) < 0.5 * error(at_random(9, 10))


def test_more_classes_than_directions() -> None:
    """Unseen tokens have no direction at all, and there may be more of them than fit a class."""
    scale = np.zeros(V, np.float32)
    scale[:5] = 1
    unseen = TokenMap(SCALED.codes, SCALED.num_codes, CODEBOOKS, scale=scale)
    classes = near(unseen, 20, 10)
    assert set(classes.of_token) == {-1, *range(20)}
    assert classes.scale is not None and np.all(np.isfinite(classes.scale))


@pytest.mark.parametrize("make", ["random", "near"])
def test_same_seed_same_classes(make: str) -> None:
    def classes(seed: int) -> TokenClasses:
        return at_random(9, 10, seed) if make == "random" else near(SCALED, 9, 10, seed)

    first, again, other = classes(0), classes(0), classes(1)
    for name in ("of_token", "codes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.of_token, other.of_token)


def test_random_codes_are_used_equally_often() -> None:
    classes = at_random(15, 10)
    for column in classes.codes.T:
        sizes = np.bincount(column, minlength=K)
        assert len(sizes) == K and sizes.max() - sizes.min() <= 1


def test_random_classes_do_not_follow_the_codes() -> None:
    """Where ids are in order of frequency, both are dealt out in the same order."""
    codes = random_map(V, K, seed=3)[:, 0]
    falling = np.arange(V)[::-1]
    classes = random_classes(falling, K, 0, num_codes=K, num_codebooks=1, seed=3)
    assert len(set(zip(codes, classes.of_token, strict=True))) > 2 * K
