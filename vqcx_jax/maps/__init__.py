"""Token maps: which code, or codes, every token of a vocabulary has."""

from vqcx_jax.maps.make import log_shares, make_map, own_map
from vqcx_jax.maps.report import describe
from vqcx_jax.maps.token_map import TokenClasses, TokenMap

__all__ = ["TokenClasses", "TokenMap", "describe", "log_shares", "make_map", "own_map"]
