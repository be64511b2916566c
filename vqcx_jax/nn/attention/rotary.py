"""RoPE as an encoding, and the frequencies that all encodings by rotation share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vqcx_jax.config import schema
from vqcx_jax.nn.attention.base import (
    HEADS,
    PER_HEAD,
    Encoding,
    Phases,
    QueriesAndKeys,
    TokenInfo,
)
from vqcx_jax.nn.layers import ROWS
from vqcx_jax.nn.variables import Param, logical_axes, param
from vqcx_jax.ops import attention as ops
from vqcx_jax.ops import euler_turn
from vqcx_jax.ops.flash_attention.amplitude import Amplitude
from vqcx_jax.sharding import LogicalAxes, constrain, per_device

# A function of `ops.attention.encode`, and what it takes after the table.
Adapt = tuple[Callable[..., QueriesAndKeys], tuple[Param, ...]]
# Of those that kernels know: what it takes by the kernels' names, and their amplitude.
_IN_KERNELS: dict[Callable[..., QueriesAndKeys], tuple[tuple[str, ...], Amplitude | None]] = {
    ops.rope_queries_and_keys: ((), None),
    ops.complex_queries_and_keys: (("delta", "bias"), None),
    ops.amplitude_queries_and_keys: (("bias",), "modulus"),
    ops.pope_queries_and_keys: (("bias",), "softplus"),
}


class RotaryEncoding(Encoding):
    """RoPE: queries and keys turned by position times frequency.

    P planes turn: head_dim / 2 unless `num_planes` says otherwise. Trained frequencies are
    omega exp(log_ratio), where they start at omega: (P,), or (K, P) for frequencies of each key
    head.
    """

    def __init__(
        self,
        attention: schema.Rotary,
        num_kv_heads: int,
        head_dim: int,
        rules: schema.ShardingRules,
        num_planes: int | None = None,
    ):
        super().__init__(head_dim, rules)
        self.num_planes = num_planes or head_dim // 2
        self.attention = attention
        self.num_kv_heads = num_kv_heads
        if attention.extension == "yarn":
            self.scale *= ops.yarn_magnitude(attention.extension_factor) ** 2
        if attention.learned_frequencies:
            shape = self._first_frequencies().shape
            axes = PER_HEAD if len(shape) == 2 else (None,)
            self.log_ratio = param(jnp.zeros(shape, jnp.float32), axes, decay=False)

    def frequencies(self) -> jax.Array:
        """Radians per position, float32 (P,) or (K, P), as training left them."""
        frequencies = self._first_frequencies()
        if self.attention.learned_frequencies:
            frequencies = frequencies * jnp.exp(self.log_ratio[...])
        return self._extended(frequencies)

    def table(self, positions: jax.Array) -> tuple[jax.Array, ...]:
        """Cosines and sines, (B, T, P) or (B, T, K, P); () for trained frequencies."""
        return () if self.attention.learned_frequencies else self._table(positions)

    def __call__(self, q: jax.Array, k: jax.Array, info: TokenInfo) -> QueriesAndKeys:
        """See `Encoding`."""
        function, trained = self._adapt()
        may_be_kernel = q.shape[1] > 1 and self.attention.implementation != "xla"
        if function is ops.complex_queries_and_keys and may_be_kernel:
            function = euler_turn.queries_and_keys
        table = info.table or self._table(info.positions)
        return self._encode(function, q, k, table, *trained)

    def phases(self) -> Phases | None:
        """Frequencies and what the kind has beside them, if kernels know it."""
        function, trained = self._adapt()
        if function not in _IN_KERNELS:
            return None
        names, amplitude = _IN_KERNELS[function]
        frequencies = self.frequencies()
        arrays, axes = {"frequencies": frequencies}, {"frequencies": self._axes(frequencies)}
        for name, x in zip(names, trained, strict=True):
            arrays[name], axes[name] = x[...], logical_axes(x)
        return Phases(arrays, axes, amplitude)

    def _adapt(self) -> Adapt:
        return ops.rope_queries_and_keys, ()

    def _table(self, positions: jax.Array) -> tuple[jax.Array, ...]:
        frequencies = self.frequencies()
        axes = self._axes(frequencies)
        out_axes = HEADS if frequencies.ndim == 2 else (*ROWS, None)
        make = per_device(ops.rotary_table, (ROWS, axes), (out_axes, out_axes), self.rules)
        return make(positions, constrain(frequencies, axes, self.rules))

    def _axes(self, frequencies: jax.Array) -> LogicalAxes:
        return PER_HEAD if frequencies.ndim == 2 else (None,)

    def _first_frequencies(self) -> jax.Array:
        base, fraction = self.attention.rope_base, self.attention.rope_fraction
        width = 2 * self.num_planes
        if self.attention.frequencies == "per_head":
            return ops.per_head_frequencies(self.num_kv_heads, width, base, fraction=fraction)
        return ops.rope_frequencies(width, base, fraction=fraction)

    def _extended(self, frequencies: jax.Array) -> jax.Array:
        factor, length = self.attention.extension_factor, self.attention.trained_length
        match self.attention.extension:
            case "linear":
                return ops.linear_frequencies(frequencies, factor)
            case "ntk":
                return ops.ntk_frequencies(frequencies, factor)
            case "yarn":
                assert length is not None
                return ops.yarn_frequencies(frequencies, factor, length)
        return frequencies
