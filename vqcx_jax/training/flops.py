"""Model FLOPs, for MFU (model FLOPs utilisation: useful FLOPs over what the devices could do)."""

import jax

from vqcx_jax.config import schema
from vqcx_jax.ops.hierarchical import class_size, path_length
from vqcx_jax.ops.softmax.adaptive import cluster_shapes

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

    6 per matrix weight and token, plus causal attention: 6 L H (key_width + d) for each key that a
    query sees, (T + 1) / 2 of them on average, or less with a window.
    """
    trunk, head = matrix_parameters(config)
    window = min(config.attention.window or seq_len, seq_len)
    keys = window - window * (window - 1) / (2 * seq_len)
    widths = _key_width(config) + config.head_dim
    return 6.0 * (trunk + head + config.num_layers * config.num_heads * widths * keys)


def matrix_parameters(config: schema.Model) -> tuple[int, int]:
    """Weights that take part in a token's matrix products: of all layers, and of the head."""
    attention_width = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    trunk = config.num_layers * config.embed_dim * (attention_width + 3 * config.mlp_dim)
    return trunk, _head_parameters(config)


def _key_width(config: schema.Model) -> int:
    match config.attention:
        case schema.HarmonicAttention(num_harmonics=num_harmonics):
            return num_harmonics * config.head_dim
        case schema.PopeAttention():
            return 2 * config.head_dim
    return config.head_dim


def _head_parameters(config: schema.Model) -> int:
    vocab_size, dim = config.known_vocab_size(), config.embed_dim
    match config.head:
        case schema.VQHead():
            return _vq_parameters(config.head, vocab_size, dim)
        case schema.ClassVQHead(num_codes=num_codes):
            num_classes, num_frequent, _ = config.head.sizes(vocab_size)
            return (num_classes + num_frequent + num_codes) * dim
        case schema.FullHead():
            return vocab_size * dim
        case schema.LowRankHead():
            return config.head.rank * (dim + vocab_size)
        case schema.AdaptiveHead(cutoffs=cutoffs, div_value=div_value):
            clusters = cluster_shapes(vocab_size, dim, cutoffs, div_value)
            tails = sum(width * (dim + size) for size, width in clusters)
            return (cutoffs[0] + len(cutoffs)) * dim + tails
        case schema.HierarchicalHead(tree="two_level"):
            size = class_size(vocab_size)
            return (-(-vocab_size // size) + size) * dim
        case schema.HierarchicalHead():
            return path_length(vocab_size) * dim


def _vq_parameters(head: schema.VQHead, vocab_size: int, dim: int) -> int:
    closes = head.num_codebooks <= 2 and not head.token_scale
    streams_codes = head.expand_vectors is False or head.logit_soft_cap is not None
    if head.learned_candidates is not None or not (closes or streams_codes):
        return vocab_size * dim  # Vectors of all tokens, as of a full head.
    codes = head.num_codes * (1 if head.form == "product" else head.num_codebooks)
    return (codes + head.num_own_tokens) * dim


def peak_flops(device: jax.Device) -> float | None:
    """Peak of a device by its kind, None when unknown (CPUs, new devices)."""
    kind = device.device_kind
    names = [name for name in _PEAK_FLOPS if kind.startswith(name)]
    return _PEAK_FLOPS[max(names, key=len)] if names else None
