"""Queries and keys of complex attention, turned by their own phases and by their positions."""

from vqcx_jax.ops.euler_turn.api import queries_and_keys

__all__ = ["queries_and_keys"]
