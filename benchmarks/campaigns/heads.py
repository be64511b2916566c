"""The output layers that the campaigns compare, and the token maps they need."""

import dataclasses
from collections.abc import Mapping

from campaign import ShortRun, Variant

FULL = {
    "model.head.kind": "full",
    "model.head.token_bias": True,
    "model.head.implementation": "streamed",
}
BIAS = {"model.head.token_bias": True}
FILE = {"model.head.kind": "vq", "model.head.assignment": "file"}
CENTROIDS = {"model.head.code_init": "centroids"}


def variants(num_codes: int, dim: int) -> dict[str, Variant]:
    """By name, the most telling first.

    Args:
        num_codes: about 1% of V; code vectors of every variant that is not said to have others.
        dim: D.
    """
    half, quarter = num_codes // 2, num_codes // 4
    of_product = _power_of_two(num_codes)

    def product(num_codebooks: int, scale: bool = True, start: str = "centroids") -> Variant:
        return Variant(
            {
                **FILE,
                "model.head.form": "product",
                "model.head.num_codebooks": num_codebooks,
                "model.head.num_codes": of_product,
                "model.head.token_scale": scale,
                "model.head.code_init": start,
            },
            f"product {num_codebooks}{', scale' if scale else ''}",
        )

    own_additive = Variant(
        {
            **FILE,
            **CENTROIDS,
            "model.head.num_codes": quarter,
            "model.head.num_codebooks": 2,
            "model.head.num_own_tokens": half,
        },
        "own, residual 2",
    )
    num_classes = _classes(num_codes)

    def in_classes(num_codebooks: int, num_codes: int) -> Variant:
        return Variant(
            {
                "model.head.kind": "class_vq",
                "model.head.assignment": "file",
                "model.head.num_codebooks": num_codebooks,
                "model.head.num_codes": num_codes,
                "model.head.num_classes": num_classes,
                "model.head.num_frequent": num_classes,
                "model.head.token_scale": True,
                "model.head.bias_init": "counts",
                "model.head.code_init": "centroids",
            },
            f"product {num_codebooks}, scale, classes"
            if num_codes == of_product
            else f"product {num_codebooks} x {num_codes}, scale, classes",
        )

    not_rotated = dataclasses.replace(
        in_classes(64, 64), token_map="product 64 x 64, scale, classes, not rotated"
    )
    from_co_occurrence = from_counts(Variant({**FULL, "model.head.start": "cooccurrence"}))
    by_frequency = {"model.head.kind": "vq", "model.head.num_codes": num_codes}
    two_codebooks = {**FILE, "model.head.num_codes": half, "model.head.num_codebooks": 2}
    k_means = {**FILE, "model.head.num_codes": num_codes}
    return {
        "full": Variant(FULL),
        "product 16": product(16),
        "product 16 in classes": in_classes(16, of_product),
        "product 64 x 16 in classes": in_classes(64, 16),
        "product 32 x 64 in classes": in_classes(32, 64),
        "product 64 x 64 in classes": in_classes(64, 64),
        "product 64 x 64 in classes, not rotated": not_rotated,
        # Also where their vectors are more than 1%.
        **({"product 16 x 256 in classes": in_classes(16, 256)} if of_product != 256 else {}),
        "full, from co-occurrence and counts": from_co_occurrence,
        "product 16, from counts": from_counts(product(16)),
        "own + additive 2, from counts": from_counts(own_additive),
        "full, from co-occurrence": Variant({**FULL, "model.head.start": "cooccurrence"}),
        "VQ by frequency": Variant(by_frequency),
        "VQ by k-means": Variant({**k_means, **CENTROIDS}, "k-means"),
        "additive 2": Variant({**two_codebooks, **CENTROIDS}, "residual 2"),
        "additive 2, unique cells": Variant(
            {**two_codebooks, **CENTROIDS, "model.head.num_codes": _root(num_codes)},
            "residual 2, unique cells",
        ),
        "additive 4": Variant(
            {
                **FILE,
                **CENTROIDS,
                "model.head.num_codes": quarter,
                "model.head.num_codebooks": 4,
            },
            "residual 4",
        ),
        "own + additive 2": own_additive,
        "low rank, D / 16": Variant(
            {"model.head.kind": "low_rank", "model.head.rank": dim // 16, **BIAS}
        ),
        "adaptive": Variant(
            {
                "model.head.kind": "adaptive",
                "model.head.cutoffs": f"{num_codes},{num_codes * 10}",
                "model.head.div_value": 4.0,
            }
        ),
        "full, tied": Variant({**FULL, "model.head.tied": True}),
        "product 16, learned": learned(product(16)),
        "product 4": product(4),
        "product 8": product(8),
        "product 32": product(32),
        "product 16, no scale": product(16, scale=False),
        "product 16, random start": product(16, start="random"),
        "product 16, random codes": Variant(
            {
                "model.head.kind": "vq",
                "model.head.assignment": "random",
                "model.head.form": "product",
                "model.head.num_codebooks": 16,
                "model.head.num_codes": of_product,
                "model.head.token_scale": True,
            }
        ),
        "VQ by frequency, no bias": Variant({**by_frequency, "model.head.token_bias": False}),
        "VQ by k-means, no bias": Variant(
            {**k_means, **CENTROIDS, "model.head.token_bias": False}, "k-means"
        ),
        "VQ random": Variant({**by_frequency, "model.head.assignment": "random"}),
        "VQ contiguous": Variant({**by_frequency, "model.head.assignment": "contiguous"}),
        "VQ by k-means, random start": Variant(k_means, "k-means"),
        "VQ by k-means, balanced": Variant({**k_means, **CENTROIDS}, "k-means, balanced"),
        "VQ by k-means, reassigned": Variant(
            {**k_means, **CENTROIDS, "model.head.reassign_every": 50}, "k-means"
        ),
        "VQ by k-means, of a short run": Variant(
            {**k_means, **CENTROIDS}, "k-means, of a short run"
        ),
        "product 16, of a short run": dataclasses.replace(
            product(16), token_map="product 16, scale, of a short run"
        ),
        "hierarchical, classes": Variant({"model.head.kind": "hierarchical"}),
        "hierarchical, Huffman": Variant(
            {"model.head.kind": "hierarchical", "model.head.tree": "huffman"}
        ),
        "product 16, tied": tied(product(16)),
        "product 64 x 64 in classes, not rotated, tied": tied(not_rotated),
        "full, tied, from co-occurrence and counts": tied(from_co_occurrence),
        **{
            f"VQ by frequency, {name}": Variant({**by_frequency, "model.head.num_codes": number})
            for name, number in _other_numbers(num_codes).items()
        },
        **{
            f"VQ by k-means, {name}": Variant(
                {**k_means, **CENTROIDS, "model.head.num_codes": number}, f"k-means, {name}"
            )
            for name, number in _other_numbers(num_codes).items()
        },
    }


def maps(num_codes: int) -> dict[str, Mapping[str, object]]:
    """Options of `python -m vqcx_jax.maps`.

    All from co-occurrence counts of the training text, but for two: those are from the output
    layer of a full softmax after 150 steps.
    """
    half, quarter = num_codes // 2, num_codes // 4
    found: dict[str, Mapping[str, object]] = {
        "k-means": {"method": "kmeans", "num_codes": num_codes},
        "k-means, balanced": {"method": "kmeans", "num_codes": num_codes, "balanced": True},
        "residual 2": {"method": "residual", "num_codebooks": 2, "num_codes": half},
        "residual 2, unique cells": {
            "method": "residual",
            "num_codebooks": 2,
            "num_codes": _root(num_codes),
            "unique": True,
        },
        "residual 4": {"method": "residual", "num_codebooks": 4, "num_codes": quarter},
        "own, residual 2": {
            "method": "residual",
            "num_codebooks": 2,
            "num_codes": quarter,
            "own": half,
        },
    }
    for name, number in _other_numbers(num_codes).items():
        found[f"k-means, {name}"] = {"method": "kmeans", "num_codes": number}
    for m in (4, 8, 16, 32):
        options = {
            "method": "product",
            "num_codebooks": m,
            "num_codes": _power_of_two(num_codes),
            "rotate": True,
        }
        found[f"product {m}"] = options
        found[f"product {m}, scale"] = {**options, "scale": True}
    short = ShortRun(
        {
            **FULL,
            "train.steps": 150,
            "train.checkpoint_every": 150,
            "optimizer.learning_rate": 4e-3,
        }
    )
    for name in ("k-means", "product 16, scale"):
        found[f"{name}, of a short run"] = {**found[name], "vectors": short}
    num_classes = _classes(num_codes)
    classes = {"classes": num_classes, "frequent": num_classes}
    found["product 16, scale, classes"] = {**found["product 16, scale"], **classes}
    for m, k in ((64, 16), (32, 64), (64, 64), (16, 256)):
        options = {**found["product 16, scale"], "num_codebooks": m, "num_codes": k}
        found[f"product {m} x {k}, scale, classes"] = {**options, **classes}
    found["product 64 x 64, scale, classes, not rotated"] = {
        **found["product 64 x 64, scale, classes"],
        "rotate": False,
    }
    return found


def learned(variant: Variant) -> Variant:
    """With codes chosen among the four nearest, while training."""
    return dataclasses.replace(
        variant, overrides={**variant.overrides, "model.head.learned_candidates": 4}
    )


def from_counts(variant: Variant) -> Variant:
    """With token biases that start at the logarithms of the tokens' shares of the text."""
    return dataclasses.replace(
        variant, overrides={**variant.overrides, "model.head.bias_init": "counts"}
    )


def tied(variant: Variant) -> Variant:
    """With an input embedding of the same codes."""
    return dataclasses.replace(variant, overrides={**variant.overrides, "model.head.tied": True})


def _other_numbers(num_codes: int) -> dict[str, int]:
    """Of codes, by name: two orders of magnitude from the smallest to the largest."""
    return {"K / 10": num_codes // 10, "K x 10": num_codes * 10}


def _classes(num_codes: int) -> int:
    """About 4 sqrt(V), as num_codes is V / 100."""
    return round(40 * num_codes**0.5)


def _root(num_codes: int) -> int:
    """So many rows and columns have a cell for each of 100 num_codes tokens, and some more."""
    return round(10 * num_codes**0.5) + 1


def _power_of_two(number: int) -> int:
    """The largest one that is not larger."""
    return 1 << (number.bit_length() - 1)
