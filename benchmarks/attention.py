"""Attention with every encoding, beside RoPE: python benchmarks/attention.py [--lengths 256 1024].

Scores and sums: from queries, keys and values to outputs, forward + backward by all of them and by
what the encoding trains; causal, float32. Layer: the same with the projections. Training step: loss
and gradients of a transformer of --layers layers with an output layer of one codebook, which takes
next to no time, so that the share of attention is as large as it gets. All have --tokens positions,
in rows of each of --lengths.

All rows of a table run in one process, and each repetition runs every row once: as many calls as
fill 0.2 s, without a pause, of which only the last one is waited for. A ratio is the median over
repetitions of the row's time over RoPE's in the same repetition, and in brackets the lowest and
highest one. Memory is what the compiled program needs beside its arguments and results.
"""

import argparse
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timing import Step, compile_step, measure, print_ratios

from vqcx_jax.config import schema
from vqcx_jax.nn import Attention, Transformer, functional
from vqcx_jax.nn.loss import summed_nll

KINDS: dict[str, schema.AttentionConfig] = {
    "RoPE": schema.RopeAttention(),
    "0.75-RoPE": schema.RopeAttention(rope_fraction=0.75),
    "NoPE": schema.NopeAttention(),
    "ALiBi": schema.AlibiAttention(),
    "PoPE": schema.PopeAttention(),
    "EulerFormer": schema.EulerFormerAttention(),
    "complex": schema.ComplexAttention(),
    "complex, learned frequencies": schema.ComplexAttention(learned_frequencies=True),
    "amplitude (delta = 0)": schema.AmplitudeAttention(),
    "smooth": schema.SmoothAttention(),
    "harmonic, R = 2": schema.HarmonicAttention(),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Positions of all rows, and the shape of a model."""

    tokens: int
    length: int
    head_dim: int
    heads: int
    layers: int

    def __str__(self) -> str:
        rows = self.tokens // self.length
        return f"B={rows} T={self.length} H={self.heads} d={self.head_dim}"


def split_layer(attention: schema.AttentionConfig, sizes: Sizes) -> tuple[Any, Any, Any]:
    layer = Attention(
        sizes.heads * sizes.head_dim,
        num_heads=sizes.heads,
        num_kv_heads=sizes.heads,
        head_dim=sizes.head_dim,
        attention=attention,
        rngs=nnx.Rngs(0),
    )
    graphdef, params, buffers = functional.split(layer)
    return graphdef, randomised(params), buffers


def layer_step(attention: schema.AttentionConfig, sizes: Sizes) -> Step:
    graphdef, params, buffers = split_layer(attention, sizes)
    shape = (sizes.tokens // sizes.length, sizes.length, sizes.heads * sizes.head_dim)
    normal = np.random.default_rng(1).standard_normal
    x, out = (jnp.asarray(normal(shape), jnp.float32) for _ in range(2))

    def loss(params: Any, x: jax.Array, buffers: Any) -> jax.Array:
        return jnp.sum(out * nnx.merge(graphdef, params, buffers)(x)[0])

    return compile_step(jax.grad(loss, (0, 1)), params, x, buffers)


def core_step(attention: schema.AttentionConfig, sizes: Sizes) -> Step:
    graphdef, params, buffers = split_layer(attention, sizes)
    shape = (sizes.tokens // sizes.length, sizes.length, sizes.heads, sizes.head_dim)
    normal = np.random.default_rng(1).standard_normal
    q, k, v, out = (jnp.asarray(normal(shape), jnp.float32) for _ in range(4))
    segment_ids = jnp.zeros(shape[:2], jnp.int32)
    positions = segment_ids + jnp.arange(sizes.length)

    def loss(params: Any, q: jax.Array, k: jax.Array, v: jax.Array, buffers: Any) -> jax.Array:
        layer = nnx.merge(graphdef, params, buffers)
        q, k = layer.encoding(q, k, layer.encoding.info(segment_ids, positions))
        return jnp.sum(out * layer.attend(q, k, v, segment_ids))

    return compile_step(jax.grad(loss, (0, 1, 2, 3)), params, q, k, v, buffers)


def training_step(attention: schema.AttentionConfig, sizes: Sizes) -> Step:
    dim = sizes.heads * sizes.head_dim
    config = schema.Model(
        vocab_size=32_768,
        embed_dim=dim,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        num_kv_heads=sizes.heads,
        head_dim=sizes.head_dim,
        mlp_dim=11 * dim // 4,
        attention=attention,
        head=schema.VQHead(num_codes=512, assignment="contiguous"),
    )
    graphdef, params, buffers = functional.split(Transformer(config, rngs=nnx.Rngs(0)))
    shape = (sizes.tokens // sizes.length, sizes.length)
    tokens = jnp.asarray(np.random.default_rng(1).integers(32_768, size=(2, *shape)), jnp.int32)
    batch = {
        "inputs": tokens[0],
        "targets": tokens[1],
        "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.zeros(shape, jnp.int32) + jnp.arange(sizes.length),
    }

    def loss(params: Any, buffers: Any, batch: Any) -> jax.Array:
        return summed_nll(graphdef, params, buffers, batch)[0]

    return compile_step(jax.value_and_grad(loss), randomised(params), buffers, batch)


def randomised(params: Any) -> Any:
    """Encodings as training leaves them: away from where they start."""
    rng = np.random.default_rng(2)

    def move(path: Any, x: jax.Array) -> jax.Array:
        if "encoding" not in jax.tree_util.keystr(path):
            return x
        return x + jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(move, params)


STEPS = {"scores and sums": core_step, "layer": layer_step, "training step": training_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--head_dim", type=int, nargs="+", default=[64])
    parser.add_argument("--heads", type=int, nargs="+", default=[4])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS], metavar="KIND")
    args = parser.parse_args()
    kinds = {name: KINDS[name] for name in dict.fromkeys(["RoPE", *args.kinds])}
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for length, head_dim, heads in itertools.product(args.lengths, args.head_dim, args.heads):
        sizes = Sizes(args.tokens, length, head_dim, heads, args.layers)
        for title, make in STEPS.items():
            rows = {name: make(kind, sizes) for name, kind in kinds.items()}
            measure(rows, args.repeats)
            print_ratios(f"{title}, {sizes}", rows, "RoPE")


if __name__ == "__main__":
    main()
