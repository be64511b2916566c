"""The report before training, against numbers worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest

from vqcx_jax.maps import TokenClasses, TokenMap, describe
from vqcx_jax.maps.report import (
    code_bits,
    code_bytes,
    code_usage,
    distinct_tuples,
    perplexity_floor,
    tuple_sizes,
    vector_parameters,
)

# Tokens 0 and 1 share both codes, as would token 5 if it had no vector of its own.
MAP = TokenMap(
    np.asarray([[0, 0], [0, 0], [0, 1], [1, 1], [2, 1], [0, 0]], np.int32),
    num_codes=(3, 4),
    own_tokens=np.asarray([5], np.int32),
)
COUNTS = np.asarray([3, 1, 2, 2, 0, 8])
# Token 0 is in no class; 1 and 5 are in the same one and share both codes.
IN_CLASSES = TokenMap(
    MAP.codes,
    MAP.num_codes,
    classes=TokenClasses(
        np.asarray([-1, 0, 0, 1, 1, 0], np.int32), np.asarray([[0, 0], [1, 1]], np.int32)
    ),
)


def test_codes() -> None:
    assert code_bits(MAP) == 2 + 2
    assert code_bytes(MAP) == 3  # 6 x 4 bits.
    assert code_bytes(dataclasses.replace(MAP, num_codes=(3, 2))) == 3  # 18 bits.
    assert distinct_tuples(MAP) == 4
    np.testing.assert_array_equal(tuple_sizes(MAP), [2, 2, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("num_codes", "bits"), [((1,), 0), ((2,), 1), ((256,), 8), ((257,), 9), ((512, 500), 18)]
)
def test_bits_of_a_code(num_codes: tuple[int, ...], bits: int) -> None:
    codes = np.zeros((600, len(num_codes)), np.int32)
    assert code_bits(TokenMap(codes, num_codes)) == bits


def test_vectors() -> None:
    assert vector_parameters(MAP, 8, "additive") == 7 * 8 + 8
    assert vector_parameters(MAP, 8, "product") == 7 * 4 + 8


def test_usage() -> None:
    first, second = code_usage(MAP, COUNTS)
    # First codebook: 6, 2 and 0 of 8 occurrences; second: 4 and 4, codes 2 and 3 unused.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert first == (pytest.approx(math.exp(entropy)), 0)
    assert second == (pytest.approx(2.0), 2)


def test_usage_of_codes_that_the_text_never_needs() -> None:
    assert code_usage(MAP, np.asarray([0, 0, 0, 0, 0, 8]))[0] == (1.0, 0)


def test_floor() -> None:
    # 4 of 16 occurrences are of tokens that share their codes with one other.
    assert perplexity_floor(MAP, COUNTS) == pytest.approx(2 ** (4 / 16))
    unique = TokenMap(np.arange(6, dtype=np.int32)[:, None], (6,))
    assert perplexity_floor(unique, COUNTS) == 1.0
    tied = TokenMap(np.zeros((6, 1), np.int32), (1,))
    assert perplexity_floor(tied, COUNTS) == pytest.approx(6.0)


def test_floor_is_what_a_tied_model_loses() -> None:
    """The best tied model, against the best untied one, on the counts themselves."""
    shares = COUNTS / COUNTS.sum()
    tied = shares.copy()
    tied[:2] = tied[:2].mean()
    seen = shares > 0

    def perplexity(model: np.ndarray) -> float:
        return math.exp(-np.sum(shares[seen] * np.log(model[seen])))

    of_codes = tied * tuple_sizes(MAP)
    assert perplexity(tied) == pytest.approx(perplexity(of_codes) * perplexity_floor(MAP, COUNTS))


def test_text() -> None:
    text = describe(
        MAP, embed_dim=8, counts=COUNTS, form="product", token_bias=False, token_scale=False
    )
    assert text.splitlines() == [
        "codes    3 + 4 a token, 4 bits: 4 different ones for 5 tokens; "
        "1 have a vector of their own",
        "vectors  36 parameters, 75.00% of a full head's 48",
        # 3 + 72 of 96 bytes.
        "bytes    3 of codes and 72 of bfloat16 parameters, 78.12% of a full head's",
        "usage    perplexity of codes in the text 1.8 .. 2.0, 2 unused",
        "floor    tokens with equal codes are tied: perplexity x 1.189",
    ]


@pytest.mark.parametrize(("bias", "scale", "scalars"), [(True, False, 6), (True, True, 12)])
def test_scalars_of_tokens(bias: bool, scale: bool, scalars: int) -> None:
    text = describe(
        MAP, embed_dim=8, counts=COUNTS, form="product", token_bias=bias, token_scale=scale
    )
    assert f"; {(36 + scalars) / 48:.2%} with {scalars} biases and scales" in text
    assert f"3 of codes and {2 * (36 + scalars)} of bfloat16 parameters" in text
    broken = "would be tied without biases and scales: perplexity x 1.189"
    assert text.splitlines()[-1] == f"floor    tokens with equal codes {broken}"


def test_classes_tell_tokens_apart() -> None:
    assert distinct_tuples(IN_CLASSES) == 5
    np.testing.assert_array_equal(tuple_sizes(IN_CLASSES), [1, 2, 1, 1, 1, 2])
    assert perplexity_floor(IN_CLASSES, COUNTS) == pytest.approx(2 ** (9 / 16))


@pytest.mark.parametrize(("bias", "scale", "scalars"), [(True, False, 8), (True, True, 16)])
def test_classes_have_codes_and_scalars_too(bias: bool, scale: bool, scalars: int) -> None:
    # 6 + 2 tuples of 4 bits, and 6 times one of 2 classes or none.
    assert code_bytes(IN_CLASSES) == math.ceil((8 * 4 + 6 * 2) / 8)
    text = describe(
        IN_CLASSES, embed_dim=8, counts=COUNTS, form="product", token_bias=bias, token_scale=scale
    )
    codes, vectors, num_bytes, _, classes, _ = text.splitlines()
    assert "5 different ones for 6 tokens" in codes
    assert vectors.endswith(f"; {(28 + scalars) / 48:.2%} with {scalars} biases and scales")
    assert f" 6 of codes and {2 * (28 + scalars)} of bfloat16 parameters" in num_bytes
    assert classes == "classes  2 of at most 3 tokens, beside 1 frequent ones"


def test_equal_codebooks_are_named_once() -> None:
    codes = np.arange(12, dtype=np.int32).reshape(6, 2) % 4
    text = describe(
        TokenMap(codes, (4, 4)),
        embed_dim=8,
        counts=COUNTS,
        form="additive",
        token_bias=True,
        token_scale=False,
    )
    assert text.startswith("codes    2 x 4 a token, 4 bits: ")
