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


class Codes(NamedTuple):
    """Codes of V tokens and C classes, in the orders in which they are read.

    A training step reads those of entries and members alone.

    Attributes:
        of_nodes: int (V + C, M).
        of_entries: int (F + C, M).
        of_members: int (C, M, R); any code where there is no member.
    """

    of_nodes: jax.Array
    of_entries: jax.Array
    of_members: jax.Array


class Weights(NamedTuple):
    """Attributes: codebooks (M, K, D / M); codes; scale, bias (V + C,) or None."""

    codebooks: jax.Array
    codes: Codes
    scale: jax.Array | None
    bias: jax.Array | None


def arrange_codes(assignment: jax.Array, classes: Classes, num_codes: int) -> Codes:
    """The codes of all nodes, int (V + C, M) in [0, num_codes), as uint8 up to 256 codes."""
    nodes = jnp.asarray(assignment).astype(jnp.uint8 if num_codes <= 256 else jnp.int32)
    members_CxRxM = nodes[jnp.maximum(classes.members, 0)]
    return Codes(nodes, nodes[classes.entries], jnp.moveaxis(members_CxRxM, -1, 1))


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
