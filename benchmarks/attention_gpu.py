"""Attention on an NVIDIA GPU, in bfloat16: python benchmarks/attention_gpu.py.

From raw queries and keys to the gradients by them, by values and by what the encoding trains;
causal, softmax by cuDNN. Rows: queries and keys as they are; turned by RoPE; turned as complex
attention by plain JAX ("xla") and by the kernel ("mosaic_gpu"). "segments": of four documents a
row, which cuDNN is shown by a mask. Timing as in benchmarks/attention.py.
"""

import argparse
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from timing import Step, compile_step, measure, print_ratios

from vqcx_jax.ops import attention, euler_turn

TURNS = ("none", "RoPE", "xla", "mosaic_gpu")
SEGMENTS_A_ROW = 4


def core_step(turn: str, has_segments: bool, shape: tuple[int, int, int, int]) -> Step:
    num_rows, length, num_heads, head_dim = shape
    rng = np.random.default_rng(0)
    q, k, v, out = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(4))
    planes = (num_heads, head_dim // 2)
    delta = jnp.asarray(1 + 0.3 * rng.standard_normal(planes), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(planes), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(length), (num_rows, length))
    segment_ids = positions // (length // SEGMENTS_A_ROW) if has_segments else None

    def loss(
        q: jax.Array, k: jax.Array, v: jax.Array, delta: jax.Array, bias: jax.Array
    ) -> jax.Array:
        table = attention.rotary_table(positions, attention.rope_frequencies(head_dim))
        if turn == "RoPE":
            q, k = attention.rope_queries_and_keys(q, k, *table)
        elif turn != "none":
            encode = functools.partial(euler_turn.queries_and_keys, implementation=turn)
            q, k = jax.checkpoint(encode)(q, k, *table, delta, bias)
        y = attention.attend_by_cudnn(q, k, v, segment_ids, scale=head_dim**-0.5)
        return jnp.sum(out * y, dtype=jnp.float32)

    return compile_step(jax.value_and_grad(loss, (0, 1, 2, 3, 4)), q, k, v, delta, bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = ["1x8192x16x128", "4x2048x16x128", "16x1024x12x64"]
    parser.add_argument("--shapes", nargs="+", default=shapes, help="rows x length x heads x width")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for text in args.shapes:
        num_rows, length, num_heads, head_dim = map(int, text.split("x"))
        shape = (num_rows, length, num_heads, head_dim)
        rows = {
            f"{turn}{', segments' if has_segments else ''}": core_step(turn, has_segments, shape)
            for has_segments, turn in itertools.product((False, True), TURNS)
        }
        measure(rows, args.repeats)
        print_ratios(text, rows, "RoPE")


if __name__ == "__main__":
    main()
