"""What an encoding of positions is to an attention layer."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from flax import nnx

from vqcx_jax.config import schema
from vqcx_jax.nn.layers import ROWS
from vqcx_jax.nn.variables import Param, logical_axes
from vqcx_jax.ops.flash_attention.amplitude import Amplitude
from vqcx_jax.sharding import LogicalAxes, constrain, per_device

HEADS: LogicalAxes = (*ROWS, "heads", None)
# What every query head or key head has, a number for each plane.
PER_HEAD: LogicalAxes = ("heads", None)

QueriesAndKeys = tuple[jax.Array, jax.Array]


class TokenInfo(NamedTuple):
    """Where tokens stand; the same for all layers, made by `Encoding.info`.

    segment_ids: int (B, T), the packed document of each; None: every row is one document.
    positions: int (B, T), within the document.
    table: whatever the encoding computes of positions alone, () for nothing.
    """

    segment_ids: jax.Array | None
    positions: jax.Array
    table: tuple[jax.Array, ...]


class Phases(NamedTuple):
    """What `ops.flash_attention` takes to turn raw queries and keys.

    arrays: frequencies, and delta and bias if there are, by name. axes: theirs.
    """

    arrays: Mapping[str, jax.Array]
    axes: Mapping[str, LogicalAxes]
    amplitude: Amplitude | None = None


class Encoding(nnx.Module):
    """How scores come to depend on positions: none of it, as it stands here (NoPE).

    Attributes:
        key_width: of encoded queries and keys, and of the keys in a KV cache.
        scale: the scores are dot products of encoded queries and keys, times this.
    """

    def __init__(self, head_dim: int, rules: schema.ShardingRules):
        self.head_dim = head_dim
        self.key_width = head_dim
        self.scale = head_dim**-0.5
        self.rules = rules

    def __call__(self, q: jax.Array, k: jax.Array, info: TokenInfo) -> QueriesAndKeys:
        """Encoded queries and keys, (B, T, H, key_width) and (B, T, K, key_width)."""
        return q, k

    def table(self, positions: jax.Array) -> tuple[jax.Array, ...]:
        """What all layers need of the positions, which does not depend on trained arrays."""
        return ()

    def slopes(self) -> jax.Array | None:
        """Float32 (H,): the penalty per position of distance on the scores of each query head."""
        return None

    def phases(self) -> Phases | None:
        """What turns raw queries and keys, for kernels that do it; None: something else does."""
        return None

    def info(self, segment_ids: jax.Array | None, positions: jax.Array) -> TokenInfo:
        """For `__call__`, from int (B, T), see `TokenInfo`."""
        return TokenInfo(segment_ids, positions, self.table(positions))

    def _encode(
        self,
        function: Callable[..., QueriesAndKeys],
        q: jax.Array,
        k: jax.Array,
        table: tuple[jax.Array, ...],
        *trained: Param,
    ) -> QueriesAndKeys:
        """function(q, k, *table, *trained), of `ops.attention.encode`, on each device's heads."""
        axes = [HEADS, HEADS, *(HEADS if x.ndim == 4 else (*ROWS, None) for x in table)]
        axes += [logical_axes(x) for x in trained]
        if trained:
            # The backward pass takes phases once more, which needs less memory than to keep them.
            function = jax.checkpoint(function)
        run = per_device(function, axes, (HEADS, HEADS), self.rules)
        arrays = (constrain(x[...], logical_axes(x), self.rules) for x in trained)
        return run(q, k, *table, *arrays)
