"""The token map that a config asks for."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vqcx_jax.config import schema
from vqcx_jax.errors import DataError
from vqcx_jax.maps.classes import random_classes
from vqcx_jax.maps.fixed import by_frequency, contiguous_map, frequency_map, random_map
from vqcx_jax.maps.from_vectors import Options, map_from_vectors
from vqcx_jax.maps.token_map import TokenMap
from vqcx_jax.maps.vectors import cooccurrence_vectors
from vqcx_jax.maps.widths import rank_for, widen_map
from vqcx_jax.paths import local_path


def make_map(
    head: schema.VQHead | schema.ClassVQHead,
    *,
    vocab_size: int,
    embed_dim: int,
    counts: np.ndarray,
    seed: int,
    tokenizer: str | None = None,
    text: Mapping[str, Any] | None = None,
    documents: Callable[[], Iterable[np.ndarray]] | None = None,
    cached_at: Path | None = None,
) -> TokenMap:
    """Makes the map of a head, or reads the one that it names.

    Args:
        head: of a validated config.
        vocab_size: V.
        embed_dim: D, width of the hidden state.
        counts: int (V,) occurrences in the training text.
        seed: for assignment="random".
        tokenizer: fingerprint of the tokenizer in use, which a map that is read must fit.
        text: what the provenance of a map that is made says of the text, as JSON values.
        documents: for assignment="cooccurrence": gives the token ids of the training documents.
        cached_at: for assignment="cooccurrence": where the map is kept, or is read if it is there.

    Raises:
        DataError: counts or a map that do not fit the vocabulary or the head.
    """
    num_classes = num_frequent = 0
    if isinstance(head, schema.ClassVQHead):
        if head.assignment == "file":
            token_map = _read(head.codes(), vocab_size, embed_dim, tokenizer)
            check_classes(head, token_map, f"the map {head.token_map!r}")
            return token_map
        num_classes, num_frequent, _ = head.sizes(vocab_size)
        head = head.codes()
    if head.assignment == "file":
        token_map = _read(head, vocab_size, embed_dim, tokenizer)
        return dataclasses.replace(token_map, classes=None)
    sources = {**({} if tokenizer is None else {"tokenizer": tokenizer}), **(text or {})}
    if counts.shape != (vocab_size,):
        raise DataError(f"counts of shape {counts.shape}: expected one a token, ({vocab_size},)")
    if head.assignment == "cooccurrence":
        if documents is None:
            raise DataError("documents=None: assignment='cooccurrence' counts those of the text")
        options = _options(head, num_classes, num_frequent)
        found = _from_documents(options, embed_dim, counts, documents, cached_at, sources)
        return _started(head, found)
    order = by_frequency(counts)
    own = order[: head.num_own_tokens].astype(np.int32)
    coded = np.sort(order[head.num_own_tokens :])
    codes = np.zeros((vocab_size, head.num_codebooks), np.int32)
    codes[coded] = _codes(head, counts[coded], seed)
    of_classes = None
    if num_classes:
        of_classes = random_classes(
            counts,
            num_classes,
            num_frequent,
            num_codes=head.num_codes,
            num_codebooks=head.num_codebooks,
            seed=seed,
        )
    sizes = (head.num_codes,) * head.num_codebooks
    seeds = {"seed": seed} if head.assignment == "random" else {}
    provenance = {"assignment": head.assignment, **seeds, **sources}
    return TokenMap(codes, sizes, own_tokens=own, classes=of_classes, provenance=provenance)


def _codes(head: schema.VQHead, counts: np.ndarray, seed: int) -> np.ndarray:
    if head.assignment == "random":
        return random_map(len(counts), head.num_codes, seed, head.num_codebooks)
    if head.assignment == "contiguous":
        return contiguous_map(len(counts), head.num_codes)
    return frequency_map(counts, head.num_codes)


def _read(head: schema.VQHead, vocab_size: int, embed_dim: int, tokenizer: str | None) -> TokenMap:
    assert head.token_map is not None
    token_map = TokenMap.load(
        local_path("model.head.token_map", head.token_map),
        vocab_size=vocab_size,
        tokenizer=tokenizer,
    )
    check_sizes(head, token_map, f"the map {head.token_map!r}")
    if head.code_init == "centroids":
        _check_start(head, token_map, embed_dim)
    return _started(head, token_map)


def own_map(vocab_size: int, vectors: np.ndarray | None = None) -> TokenMap:
    """The map of a full head: every token has an own vector.

    Args:
        vectors: float32 (V, D) to start from; None: random ones.
    """
    return TokenMap(
        np.zeros((vocab_size, 1), np.int32),
        (1,),
        own_tokens=np.arange(vocab_size, dtype=np.int32),
        own_vectors=vectors,
    )


def log_shares(counts: np.ndarray) -> np.ndarray:
    """Logarithm of each token's share of the text, unseen ones as if once. float32 (V,)."""
    counts = np.maximum(counts, 1)
    return np.log(counts / counts.sum()).astype(np.float32)


def _options(head: schema.VQHead, num_classes: int, num_frequent: int) -> Options:
    methods: dict[str, Literal["residual", "product"]]
    methods = {"additive": "residual", "product": "product"}
    return Options(
        method="kmeans" if head.num_codebooks == 1 and not num_classes else methods[head.form],
        num_codes=head.num_codes,
        num_codebooks=head.num_codebooks,
        scale=head.token_scale,
        own=head.num_own_tokens,
        classes=num_classes,
        frequent=num_frequent,
    )


def _from_documents(
    options: Options,
    embed_dim: int,
    counts: np.ndarray,
    documents: Callable[[], Iterable[np.ndarray]],
    cached_at: Path | None,
    sources: Mapping[str, Any],
) -> TokenMap:
    wanted = {"options": dataclasses.asdict(options), **sources}
    if cached_at is not None and cached_at.exists():
        # A damaged file, or one that was made in another way, is made again.
        with contextlib.suppress(DataError):
            token_map = TokenMap.load(cached_at, vocab_size=len(counts))
            if wanted.items() <= token_map.provenance.items():
                return token_map
    num_slices = options.num_codebooks if options.method == "product" else 1
    rank = rank_for(embed_dim, num_slices)
    vectors = cooccurrence_vectors(documents(), len(counts), rank)
    token_map = map_from_vectors(vectors, counts, options, seed=0)
    token_map = widen_map(token_map, embed_dim, num_slices)
    provenance = {**token_map.provenance, "assignment": "cooccurrence", **sources}
    token_map = dataclasses.replace(token_map, provenance=provenance)
    if cached_at is not None:
        cached_at.parent.mkdir(parents=True, exist_ok=True)
        token_map.save(cached_at)
    return token_map


def _started(head: schema.VQHead, token_map: TokenMap) -> TokenMap:
    """With what a head starts from, or without."""
    if head.code_init == "centroids":
        return token_map
    classes = token_map.classes and dataclasses.replace(token_map.classes, scale=None)
    return dataclasses.replace(
        token_map, codebooks=None, scale=None, own_vectors=None, classes=classes
    )


def check_sizes(head: schema.VQHead, token_map: TokenMap, name: str) -> None:
    """Raises DataError, which calls the map by name, unless it has the codes of the head."""
    sizes = {
        "num_codebooks": (head.num_codebooks, token_map.num_codebooks),
        "num_codes": ((head.num_codes,) * head.num_codebooks, token_map.num_codes),
        "num_own_tokens": (head.num_own_tokens, len(token_map.own_tokens)),
    }
    for option, (wanted, found) in sizes.items():
        if wanted != found:
            value = getattr(head, option)
            accepted = found[0] if isinstance(found, tuple) and len(set(found)) == 1 else found
            raise DataError(f"model.head.{option}={value}: {name} has {accepted}")


def check_classes(head: schema.ClassVQHead, token_map: TokenMap, name: str) -> None:
    """Raises DataError, which calls the map by name, unless it has the classes of the head."""
    num_classes, num_frequent, num_ranks = head.sizes(token_map.vocab_size)
    classes = f"model.head.num_classes={num_classes}: {name}"
    if token_map.classes is None:
        raise DataError(f"{classes} has no classes")
    found = len(token_map.classes.codes)
    if found != num_classes:
        raise DataError(f"{classes} has {found}")
    frequent, *sizes = np.bincount(token_map.classes.of_token + 1)
    if frequent != num_frequent:
        raise DataError(f"model.head.num_frequent={num_frequent}: {name} has {frequent}")
    if max(sizes) > num_ranks:
        raise DataError(f"{classes} has one of {max(sizes)} tokens; must be at most {num_ranks}")


def _check_start(head: schema.VQHead, token_map: TokenMap, embed_dim: int) -> None:
    centroids = f"model.head.code_init='centroids': the map {head.token_map!r}"
    if token_map.codebooks is None:
        raise DataError(f"{centroids} has no codebooks")
    if token_map.scale is not None and not head.token_scale:
        raise DataError(f"{centroids} has a scale per token, which needs model.head.token_scale")
    slices = head.num_codebooks if head.form == "product" else 1
    widths = {codebook.shape[1] for codebook in token_map.codebooks}
    if widths != {embed_dim // slices}:
        raise DataError(
            f"{centroids} has code vectors of width {', '.join(map(str, sorted(widths)))}; "
            f"model.head.form={head.form!r} needs {embed_dim // slices}"
        )
    own = token_map.own_vectors
    if own is not None and own.shape[1] != embed_dim:
        raise DataError(
            f"{centroids} has own vectors of width {own.shape[1]}; must be "
            f"model.embed_dim={embed_dim}"
        )
