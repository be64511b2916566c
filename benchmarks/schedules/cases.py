"""Kernels and shapes whose schedules are read, and how often their conditional regions run."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CORES = {"v5p": 2, "v6e": 1}  # Of a chip; schedules are of one of them.
# Cycles a second: peak bfloat16 operations over twice the products of a bundle.
CLOCK = {"v5p": 1.75e9, "v6e": 1.75e9}

N, D, V = 8192, 2048, 128_256
T, H, HEAD_DIM, BLOCK = 8192, 16, 128, 1024


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Attributes: name, as in the dump; executions of regions by chip, on one core."""

    name: str
    executions: Mapping[str, Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes: function to compile, its arguments as (shape, dtype), and its kernels."""

    function: Callable[..., Any]
    arguments: Sequence[tuple[tuple[int, ...], str]]
    kernels: Sequence[Kernel]


def compile_for(name: str, chip: str) -> dict[str, float]:
    """Compiles a case for the first chip of a topology; what the compiler says of it."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("chip",), devices=devices[:1], axis_types=auto)
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    case = CASES[name]
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
        for shape, dtype in case.arguments
    ]
    with jax.set_mesh(mesh):
        lowered = jax.jit(case.function).trace(*arguments).lower(lowering_platforms=("tpu",))
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    estimates = map(int, re.findall(r'"estimated_cycles":"?(\d+)', compiled.as_text()))
    return {
        "arguments, MB": memory.argument_size_in_bytes / 1e6,
        "results, MB": memory.output_size_in_bytes / 1e6,
        "temporaries, MB": memory.temp_size_in_bytes / 1e6,
        # XLA has none for kernels, and the largest integer for what it gives to the SparseCore.
        "XLA's estimate for the rest, M cycles": sum(n for n in estimates if n < 2**62) / 1e6,
    }


# Sums are set to zero once; all else runs in each step.
_RESIDENT = Kernel("vqcx_resident_softmax", {chip: (1,) for chip in TOPOLOGIES})


def _streamed(num_codebooks: int, num_codes: int, product_dtype: str, has_scale: bool) -> Case:
    from vqcx_jax.ops.codebook import streaming

    def loss(l_NxMK: jax.Array, codes: jax.Array, bias: jax.Array, scale: jax.Array) -> jax.Array:
        code_logits = tuple(jnp.split(l_NxMK, num_codebooks, axis=1))
        z = streaming.log_z(
            code_logits,
            codes,
            bias,
            scale if has_scale else None,
            implementation="pallas_tpu",
            product_dtype=product_dtype,
        )
        return jnp.sum(z)

    # Setting up and finishing are for each block of 1024 positions.
    once = {chip: N // 1024 // cores for chip, cores in CORES.items()}
    return Case(
        jax.value_and_grad(loss, (0, 2, 3)),
        [
            ((N, num_codebooks * num_codes), "float32"),
            ((V, num_codebooks), "int32"),
            ((V,), "float32"),
            ((V,), "float32"),
        ],
        [
            Kernel("vqcx_codebook_log_z_forward", {c: (n, n) for c, n in once.items()}),
            Kernel("vqcx_codebook_log_z_backward", {c: (n, 1) for c, n in once.items()}),
        ],
    )


def _classes(implementation: str, product_dtype: str) -> Case:
    """The default head: 16 codebooks of 64, 1432 frequent tokens and as many classes of <= 256."""
    from vqcx_jax.ops.codebook import classes

    num_codebooks, num_codes, num_classes, num_ranks = 16, 64, 1432, 256
    num_nodes = V + num_classes

    def loss(
        h: jax.Array,
        codebooks: jax.Array,
        scale: jax.Array,
        bias: jax.Array,
        codes: jax.Array,
        tokens: tuple[jax.Array, ...],
        targets: jax.Array,
    ) -> jax.Array:
        weights = classes.Weights(codebooks, codes, scale, bias)
        return classes.summed_nll(
            h,
            weights,
            classes.Classes(*tokens),
            targets,
            targets >= 0,
            implementation=implementation,
            product_dtype=product_dtype,
        )

    # At most: as if each class occurred. A class that does not has no tile.
    tiles = N // 16 + num_classes
    kernels = [
        _RESIDENT,
        Kernel("vqcx_members_forward", {chip: (tiles,) for chip in TOPOLOGIES}),
        Kernel("vqcx_members_backward", {chip: (tiles,) for chip in TOPOLOGIES}),
    ]
    tokens = [
        ((2 * num_classes,), "int32"),
        ((V,), "int32"),
        ((num_classes, num_ranks), "int32"),
        ((V,), "int32"),
    ]
    return Case(
        lambda h, codebooks, scale, bias, codes, *rest: jax.value_and_grad(loss, (0, 1, 2, 3))(
            h, codebooks, scale, bias, codes, rest[:-1], rest[-1]
        ),
        [
            ((N, D), "bfloat16"),
            ((num_codebooks, num_codes, D // num_codebooks), "bfloat16"),
            ((num_nodes,), "float32"),
            ((num_nodes,), "float32"),
            ((num_nodes, num_codebooks), "int32"),
            *tokens,
            ((N,), "int32"),
        ],
        kernels if implementation == "pallas_tpu" else [],
    )


def _one_codebook(implementation: str) -> Case:
    """M = 1 in closed form: 1% of V code vectors."""
    from vqcx_jax.ops import codebook

    def loss(
        h: jax.Array, codes: jax.Array, assignment: jax.Array, targets: jax.Array, bias: jax.Array
    ) -> jax.Array:
        sums = codebook.summed_nll(
            h, codes, assignment, targets, targets >= 0, bias, implementation=implementation
        )
        return sums[0]

    return Case(
        jax.value_and_grad(loss, (0, 1, 4)),
        [
            ((N, D), "bfloat16"),
            ((1280, D), "bfloat16"),
            ((V,), "int32"),
            ((N,), "int32"),
            ((V,), "float32"),
        ],
        [_RESIDENT] if implementation == "pallas_tpu" else [],
    )


def _two_codebooks() -> Case:
    """M = 2, additive, in closed form, by XLA: sqrt(V) codes each."""
    from vqcx_jax.ops.codebook import loss as codebook_loss
    from vqcx_jax.ops.codebook import multi

    def loss(
        h: jax.Array,
        codebooks: tuple[jax.Array, ...],
        assignment: jax.Array,
        targets: jax.Array,
        bias: jax.Array,
    ) -> jax.Array:
        code_logits = multi.additive_code_logits(h, codebooks)
        return jnp.sum(codebook_loss.nll(code_logits, assignment, targets, bias)[0])

    def of_arrays(h: jax.Array, first: jax.Array, second: jax.Array, *rest: jax.Array) -> Any:
        return jax.value_and_grad(loss, (0, 1, 4))(h, (first, second), *rest)

    return Case(
        of_arrays,
        [
            ((N, D), "bfloat16"),
            ((359, D), "bfloat16"),
            ((359, D), "bfloat16"),
            ((V, 2), "int32"),
            ((N,), "int32"),
            ((V,), "float32"),
        ],
        [],
    )


def _tokamax() -> Case:
    def loss(h: jax.Array, weights: jax.Array, targets: jax.Array) -> jax.Array:
        import tokamax
        from tokamax._src.ops.linear_softmax_cross_entropy_loss import pallas_mosaic_tpu as peer

        for op in vars(peer).values():  # It asks the host's devices, which are no TPUs here.
            if isinstance(op, type) and "supported_on" in vars(op):
                op.supported_on = lambda self, device: True
        return tokamax.linear_softmax_cross_entropy_loss(
            h, targets, weights, reduction="sum", implementation="mosaic_tpu"
        )

    # In a core's 5344 steps, over 4 slices of D: the first product starts the logits of a tile, and
    # three add to them; then their loss, or the gradient by them. Backward, in each step, both
    # gradients of the tile before, each either started or added to. Copies at edges are left out.
    logits = (1336, 4008, 1336)
    gradients = (*logits, 668, 32, 4676, 5312)
    return Case(
        jax.value_and_grad(loss, (0, 1)),
        [((N, D), "bfloat16"), ((D, V), "bfloat16"), ((N,), "int32")],
        [
            Kernel("lce_fwd", {"v5p": logits, "v6e": (*logits, 0, 0)}),
            Kernel("lce_bwd", {"v5p": (0, *gradients), "v6e": (0, 0, 0, *gradients)}),
        ],
    )


def _per_core(of_head: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Executions of all heads of a core, from those of one head."""
    return {chip: tuple(H // cores * n for n in of_head) for chip, cores in CORES.items()}


def _attention(is_complex: bool) -> Case:
    """Raw queries and keys; causal, one document."""
    from vqcx_jax.ops import flash_attention

    def loss(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        frequencies: jax.Array,
        delta: jax.Array,
        bias: jax.Array,
        positions: jax.Array,
    ) -> jax.Array:
        y = flash_attention.attend(
            q,
            k,
            v,
            frequencies=frequencies,
            delta=delta if is_complex else None,
            bias=bias if is_complex else None,
            positions=positions,
            segment_ids=None,
            scale=HEAD_DIM**-0.5,
            implementation="pallas_tpu",
        )
        return jnp.sum(y.astype(jnp.float32))

    heads = ((1, T, H, HEAD_DIM), "bfloat16")
    planes = ((H, HEAD_DIM // 2), "float32")
    # Of a head: turning a block of queries or keys, tiles on the diagonal, full tiles, finishing.
    n = T // BLOCK
    full = n * (n - 1) // 2
    return Case(
        jax.grad(loss, (0, 1, 2, 4, 5)),
        [heads, heads, heads, planes, planes, planes, ((1, T), "int32")],
        [
            Kernel("vqcx_flash_fwd", _per_core((n, n, n, full, n))),
            Kernel("vqcx_flash_bwd", _per_core((n, n, n, full, n, n))),
        ],
    )


def _splash() -> Case:
    """JAX's splash attention, of queries and keys that are turned already."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        sizes = kernel.BlockSizes(
            block_q=BLOCK,
            block_kv=BLOCK,
            block_kv_compute=BLOCK,
            block_q_dkv=BLOCK,
            block_kv_dkv=BLOCK,
            block_kv_dkv_compute=BLOCK,
            use_fused_bwd_kernel=True,
        )
        mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * H)
        attend = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
        return jnp.sum(attend(q, k, v).astype(jnp.float32))

    heads = ((H, T, HEAD_DIM), "bfloat16")
    n = T // BLOCK
    of_head = (n, n * (n + 1) // 2, n)  # Beginning, every tile that is not hidden, finishing.
    return Case(
        jax.grad(loss, (0, 1, 2)),
        [heads] * 3,
        [
            Kernel("splash_mha_fwd", _per_core(of_head)),
            Kernel("splash_mha_dkv", _per_core(of_head)),
        ],
    )


def _decode(num_kv_heads: int, width: int, implementation: str = "pallas_tpu") -> Case:
    """One token for each of 8 rows, and a full cache of 32,768 positions."""
    from vqcx_jax.ops import flash_decoding

    batch, length = 8, 32_768
    blocks = length // (2**20 // (2 * num_kv_heads * width))  # Of 1 MiB of keys.
    cache = ((batch, length, num_kv_heads, width), "bfloat16")

    def step(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array) -> jax.Array:
        return flash_decoding.attend(
            q, k, v, first, scale=width**-0.5, implementation=implementation
        )

    # Blocks that every query sees whole; a last one that is not full.
    executions = {chip: (batch // cores * blocks, 0) for chip, cores in CORES.items()}
    kernels = [Kernel("vqcx_flash_decoding", executions)]
    return Case(
        step,
        [((batch, 1, H, width), "bfloat16"), cache, cache, ((), "int32")],
        kernels if implementation == "pallas_tpu" else [],
    )


CASES: dict[str, Case] = {
    "log_z 16x16": _streamed(16, 16, "bfloat16", False),
    "log_z 16x16, scales": _streamed(16, 16, "bfloat16", True),
    "log_z 16x16, float32": _streamed(16, 16, "float32", False),
    "classes 16x64": _classes("pallas_tpu", "bfloat16"),
    "classes 16x64, XLA": _classes("xla", "float32"),
    "one codebook": _one_codebook("pallas_tpu"),
    "one codebook, XLA": _one_codebook("xla"),
    "two codebooks, XLA": _two_codebooks(),
    "full, tokamax": _tokamax(),
    "attention, complex": _attention(True),
    "attention, RoPE": _attention(False),
    "attention, splash": _splash(),
    "decode, 4 key heads": _decode(4, 128),
    "decode, 16 key heads": _decode(16, 128),
    "decode, 4 of width 64": _decode(4, 64),
    "decode, 4 key heads, XLA": _decode(4, 128, "xla"),
}
