"""Model FLOPs, for MFU (model FLOPs utilisation: useful FLOPs over what the devices could do)."""

import jax

from vqcx_jax.config import schema

# Dense bfloat16 peak of one device in FLOP/s, from the makers' data sheets.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def train_flops_per_token(config: schema.Model, seq_len: int) -> float:
    """FLOPs of forward and backward per token, recomputation not counted.

    6 per matrix weight and token, plus causal attention: 6 L T H d (half of the full square).
    """
    trunk, head = matrix_parameters(config)
    attention = 6 * config.num_layers * seq_len * config.num_heads * config.head_dim
    return 6.0 * (trunk + head) + attention


def matrix_parameters(config: schema.Model) -> tuple[int, int]:
    """Weights that take part in matrix products: of all layers, and of the head."""
    attention_width = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    trunk = config.num_layers * config.embed_dim * (attention_width + 3 * config.mlp_dim)
    head = config.head
    rows = head.num_codes if isinstance(head, schema.VQHead) else config.known_vocab_size()
    return trunk, rows * config.embed_dim


def peak_flops(device: jax.Device) -> float | None:
    """Peak of a device by its kind, None when unknown (CPUs, new devices)."""
    kind = device.device_kind
    names = [name for name in _PEAK_FLOPS if kind.startswith(name)]
    return _PEAK_FLOPS[max(names, key=len)] if names else None
