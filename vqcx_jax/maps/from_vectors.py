"""Token maps from vectors: near tokens share codes."""

from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from vqcx_jax.errors import ConfigError, DataError
from vqcx_jax.maps import quantize
from vqcx_jax.maps.classes import near_classes
from vqcx_jax.maps.fixed import by_frequency
from vqcx_jax.maps.token_map import TokenMap
from vqcx_jax.maps.unique import make_unique


@dataclass(frozen=True, kw_only=True)
class Options:
    """How vectors become codes.

    Attributes:
        method: "kmeans": one codebook; "residual": full-width codebooks, for heads of
            form="additive"; "product": codebooks of slices, for heads of form="product".
        num_codebooks: M.
        num_codes: K.
        power: an error of a token costs count^power.
        scale: quantise directions, and keep the norms in the map's `scale`.
        own: so many of the most frequent tokens get their own vector instead of codes.
        unique: no two tokens share all their codes.
        balanced: every code of a codebook has at most ceil((V - own) / K) tokens (before `unique`).
        rotate: "product" only: rotate the vectors first, see `quantize.product`.
        classes: "product" only: put tokens into so many classes, see `maps.classes`; 0: none.
        frequent: with classes: so many of the most frequent tokens are in none.
    """

    method: Literal["kmeans", "residual", "product"]
    num_codes: int
    num_codebooks: int = 1
    power: float = 0.5
    scale: bool = False
    own: int = 0
    unique: bool = False
    balanced: bool = False
    rotate: bool = False
    classes: int = 0
    frequent: int = 0

    def __post_init__(self) -> None:
        if self.method == "kmeans" and self.num_codebooks > 1:
            raise ConfigError(
                f"num_codebooks={self.num_codebooks}: must be 1 for method='kmeans'; "
                "method='residual' makes several"
            )
        if self.rotate and self.method != "product":
            raise ConfigError(f"rotate=True: needs method='product', not {self.method!r}")
        if self.classes and self.method != "product":
            raise ConfigError(
                f"classes={self.classes}: needs method='product', not {self.method!r}"
            )
        if self.classes and self.own:
            raise ConfigError(f"own={self.own}: must be 0 with classes={self.classes}")
        if self.frequent and not self.classes:
            raise ConfigError(f"frequent={self.frequent}: needs classes of 1 or more")


def map_from_vectors(
    vectors: np.ndarray, counts: np.ndarray, options: Options, seed: int
) -> TokenMap:
    """Quantises one vector per token.

    With `rotate` all vectors of the map lie in the rotated space: a linear model of hidden
    states takes any rotation for granted.

    Args:
        vectors: float (V, D), finite.
        counts: int (V,) occurrences in the training text; unseen tokens count as one.
        options: how.
        seed: of every random choice.

    Returns:
        A map whose provenance has the options, the seed and "distortion": the weighted squared
        error over that of the mean vector.

    Raises:
        DataError: sizes that do not fit, or too few distinct vectors for the codes.
    """
    num_tokens = len(vectors) - options.own
    if counts.shape != (len(vectors),):
        raise DataError(f"counts of shape {counts.shape}: expected ({len(vectors)},), one a token")
    if options.classes and options.classes + options.frequent > num_tokens:
        raise DataError(
            f"classes={options.classes}: must be at most {max(num_tokens - options.frequent, 0)}, "
            f"the {num_tokens} tokens without the frequent={options.frequent} most frequent ones"
        )
    if num_tokens < options.num_codes:
        raise DataError(
            f"num_codes={options.num_codes}: must be at most {max(num_tokens, 0)}, the "
            f"{len(vectors)} tokens without the own={options.own} most frequent ones"
        )
    vectors = vectors.astype(np.float32)
    order = by_frequency(counts)
    own, coded = order[: options.own], order[options.own :]
    weights = np.maximum(counts[coded], 1) ** options.power
    targets, norms = vectors[coded], None
    if options.scale:
        targets, norms = quantize.directions(targets)

    quantized = _quantize(targets, weights, options, seed)
    rotation, codebooks, dim = quantized.rotation, quantized.codebooks, vectors.shape[1]
    if rotation is not None:
        targets, vectors = targets @ rotation, vectors @ rotation
    codes = quantized.codes
    if options.unique:
        codes = make_unique(codes, targets, quantize.full_width(codebooks, dim))
    codebooks = quantize.refit(codes, codebooks, targets, weights)

    approximations = quantize.reconstruct(codes, codebooks, dim)
    if norms is not None:
        approximations *= norms[:, None]
    loss = quantize.distortion(vectors[coded], approximations, weights)
    token_map = TokenMap(
        codes=_scattered(codes, coded, len(counts), fill=0),
        num_codes=(options.num_codes,) * options.num_codebooks,
        codebooks=codebooks,
        scale=None if norms is None else _scattered(norms, coded, len(counts), fill=1),
        own_tokens=own.astype(np.int32),
        own_vectors=vectors[own] if options.own else None,
        provenance={"options": asdict(options), "seed": seed, "distortion": loss},
    )
    if not options.classes:
        return token_map
    of_classes = near_classes(
        token_map,
        np.maximum(counts, 1) ** options.power,
        options.classes,
        options.frequent,
        frequency_order=order,
        seed=seed,
    )
    return replace(token_map, classes=of_classes)


def _quantize(
    vectors: np.ndarray, weights: np.ndarray, options: Options, seed: int
) -> quantize.Quantization:
    sizes = options.num_codebooks, options.num_codes
    if options.method == "product":
        return quantize.product(
            vectors,
            *sizes,
            seed=seed,
            weights=weights,
            balanced=options.balanced,
            rotate=options.rotate,
        )
    return quantize.residual(vectors, *sizes, seed=seed, weights=weights, balanced=options.balanced)


def _scattered(rows: np.ndarray, tokens: np.ndarray, vocab_size: int, fill: float) -> np.ndarray:
    """Rows of some tokens as rows of all tokens, `fill` for the others."""
    scattered = np.full((vocab_size, *rows.shape[1:]), fill, rows.dtype)
    scattered[tokens] = rows
    return scattered
