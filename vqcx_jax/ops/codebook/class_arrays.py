"""Tokens in classes, read in all directions, and the arrays of product codes: see `classes`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.errors import UserError


class Classes(NamedTuple):
    """Where tokens stand.

    Attributes:
        entries: int32 (F + C,), nodes of the first level: frequent tokens, then classes.
        entry_of: int32 (V,), of each token: its own entry, or that of its class.
        members: int32 (C, R), the tokens of each class; -1: none.
        rank_of: int32 (V,), place of each token in its class; 0 for frequent ones.
    """

    entries: jax.Array
    entry_of: jax.Array
    members: jax.Array
    rank_of: jax.Array


class Weights(NamedTuple):
    """Of V tokens and C classes.

    Attributes:
        codebooks: (M, K, D / M).
        codes: int (V + C, M). scale, bias: (V + C,) or None.
        member_codes: int (C, M, R), the codes of tokens once more, see `member_codes`.
    """

    codebooks: jax.Array
    codes: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None
    member_codes: jax.Array


def member_codes(codes: jax.Array, members: jax.Array, num_codes: int) -> jax.Array:
    """The codes of the members of each class, of which a loss reads those of one class at a time.

    Args:
        codes: int (V + C, M), values in [0, num_codes). members: int (C, R), -1: none.

    Returns:
        uint8 (C, M, R), int32 for more than 256 codes; any code where there is no member.
    """
    codes_CxMxR = jnp.moveaxis(codes[jnp.maximum(members, 0)], -1, 1)
    return codes_CxMxR.astype(jnp.uint8 if num_codes <= 256 else jnp.int32)


def arrange(class_of: np.ndarray, num_classes: int, num_ranks: int | None = None) -> Classes:
    """Reads a map from tokens to classes in all directions.

    Args:
        class_of: int (V,), the class of each token; -1: none, it is a frequent one.
        num_classes: C.
        num_ranks: R; None: the tokens of the largest class.

    Raises:
        UserError: a class is empty, is not in [-1, C), or has more than num_ranks tokens.
    """
    vocab_size = len(class_of)
    if class_of.min() < -1 or class_of.max() >= num_classes:
        raise UserError(f"class_of: must be in [-1, {num_classes})")
    frequent, tokens = np.flatnonzero(class_of < 0), np.flatnonzero(class_of >= 0)
    sizes = np.bincount(class_of[tokens], minlength=num_classes)
    if not sizes.all():
        raise UserError(f"class_of: class {np.argmin(sizes)} has no token")
    num_ranks = num_ranks or int(sizes.max())
    if sizes.max() > num_ranks:
        raise UserError(f"num_ranks={num_ranks}: must be at least {sizes.max()}, the largest class")
    by_class = tokens[np.argsort(class_of[tokens], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    rank_of, entry_of = np.zeros(vocab_size, np.int32), np.zeros(vocab_size, np.int32)
    rank_of[by_class] = np.arange(len(tokens)) - starts[class_of[by_class]]
    entry_of[frequent] = np.arange(len(frequent))
    entry_of[tokens] = len(frequent) + class_of[tokens]
    members = np.full((num_classes, num_ranks), -1, np.int32)
    members[class_of[tokens], rank_of[tokens]] = tokens
    entries = np.append(frequent, vocab_size + np.arange(num_classes)).astype(np.int32)
    return Classes(*map(jnp.asarray, (entries, entry_of, members, rank_of)))


def num_frequent(classes: Classes) -> int:
    """F."""
    return len(classes.entries) - len(classes.members)
