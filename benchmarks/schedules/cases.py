"""Kernels and shapes whose schedules are read, and how often their conditional regions run."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from schedules import documents, dump, estimates, traffic

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
KINDS = {"v5p": "TPU v5", "v6e": "TPU v6 lite"}  # JAX's names, by which the tables go.
CORES = {"v5p": 2, "v6e": 1}  # Of a chip; schedules are of one of them.
# Cycles a second: peak bfloat16 operations over twice the products of a bundle.
CLOCK = {"v5p": 1.75e9, "v6e": 1.75e9}
# Of a core: bfloat16 products of a cycle, bytes a second from and to HBM.
PRODUCTS = {"v5p": 4 * 128 * 128, "v6e": 4 * 256 * 256}
BANDWIDTH = {"v5p": 2.765e12 / 2, "v6e": 1.64e12}

N, D, V = 8192, 2048, 128_256
T, H, HEAD_DIM, BLOCK = 8192, 16, 128, 1024
# Kinds of attention that kernels encode, and how their cases are called.
ATTENTION = {"complex": "complex", "rope": "RoPE", "pope": "PoPE", "amplitude": "amplitude"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and its conditional regions.

    Attributes:
        name: as in the dump. executions: of regions on one core.
        products: multiplications that it cannot do without, of all cores.
        optional: how many of the last ones may be too short for the dump to tell them apart.
    """

    name: str
    executions: dump.Executions
    products: float
    optional: int = 0

    def least_cycles(self, chip: str, hbm_bytes: float) -> float:
        """Of a core that only multiplies in bfloat16 at the peak rate, or only waits for memory."""
        products, moved = self.products / CORES[chip], hbm_bytes / CORES[chip]
        return max(products / PRODUCTS[chip], moved / BANDWIDTH[chip] * CLOCK[chip])

    def cycles(self, schedule: dump.Schedule) -> tuple[float, list[dump.Part]]:
        """As `Schedule.cycles`."""
        least = len(self.executions) - self.optional
        return schedule.cycles(self.executions[: max(least, len(schedule.regions))])


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled.

    Attributes:
        loss: a scalar function. by: arguments that it is differentiated by; none: any function.
        arguments: (shape, dtype). kernels: of the forward and of the backward pass, or none.
    """

    loss: Callable[..., jax.Array]
    by: tuple[int, ...]
    arguments: Sequence[tuple[tuple[int, ...], str]]
    kernels: Sequence[Kernel]


def compile_for(
    case: Case, chip: str, part: str | None = None
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Compiles a case for the first chip of a topology.

    Args:
        part: "forward" or "backward" pass alone; None: both.

    Returns:
        what the compiler says of the program; bytes that each kernel moves, see `traffic`.
    """
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("chip",), devices=devices[:1], axis_types=auto)
    sharding = jax.sharding.NamedSharding(mesh, jax.P())

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    function: Callable[..., Any] = case.loss
    arguments = [
        placed(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))) for shape, dtype in case.arguments
    ]
    with jax.set_mesh(mesh):
        if part is None and case.by:
            function = jax.value_and_grad(case.loss, case.by)
        elif part == "backward":  # Of the residuals, which the pullback is a tree of.
            pullback = jax.eval_shape(lambda *x: _pullback(case, x), *arguments)
            arguments = [jax.tree.map(placed, pullback)]
            function = _pull
        traced = jax.jit(function).trace(*arguments)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    facts = {
        "arguments, MB": memory.argument_size_in_bytes / 1e6,
        "results, MB": memory.output_size_in_bytes / 1e6,
        "temporaries, MB": memory.temp_size_in_bytes / 1e6,
        "XLA's estimate for the rest, M cycles": estimates.cycles(compiled.as_text()) / 1e6,
    }
    return facts, traffic.of_kernels(traced.jaxpr)


def _pull(pullback: Any) -> Any:
    return pullback(jnp.float32(1))


def _pullback(case: Case, arguments: Sequence[Any]) -> Any:
    def loss(*chosen: Any) -> jax.Array:
        merged = dict(enumerate(arguments)) | dict(zip(case.by, chosen, strict=True))
        return case.loss(*merged.values())

    return jax.vjp(loss, *(arguments[i] for i in case.by))[1]


def _resident(num_rows: int) -> Kernel:
    """Sums are set to zero once; all else runs in each step."""
    return Kernel("vqcx_resident_softmax", (1,), 3 * N * num_rows * D)


def _streamed(
    num_codebooks: int,
    num_codes: int,
    product_dtype: str,
    has_scale: bool,
    chip: str,
    blocks: Any = None,
) -> Case:
    from vqcx_jax.ops.codebook.streaming import block_sizes, tpu

    if blocks is None:
        blocks = block_sizes.block_sizes(KINDS[chip], num_codebooks * num_codes, N, product_dtype)

    def loss(l_NxMK: jax.Array, codes: jax.Array, bias: jax.Array, scale: jax.Array) -> jax.Array:
        code_logits = tuple(jnp.split(l_NxMK, num_codebooks, axis=1))
        scales = scale if has_scale else None
        return jnp.sum(
            tpu.log_z(code_logits, codes, bias, scales, product_dtype=product_dtype, blocks=blocks)
        )

    # Setting up and finishing are for each block of positions. Sums over positions start in each
    # group of blocks, in about 60 bundles on v6e.
    forward, backward = (N // tile.positions for tile in blocks)
    groups = 2 if backward % 2 == 0 else 1
    # With the matrix of ones and zeros; a float32 operand goes as three parts.
    products = N * V * num_codebooks * num_codes * (3 if product_dtype == "float32" else 1)
    return Case(
        loss,
        (0, 2, 3),
        [
            ((N, num_codebooks * num_codes), "float32"),
            ((V, num_codebooks), "int32"),
            ((V,), "float32"),
            ((V,), "float32"),
        ],
        [
            Kernel("vqcx_codebook_log_z_forward", _per_core(chip, (forward, forward)), products),
            Kernel(
                "vqcx_codebook_log_z_backward", _per_core(chip, (backward, groups)), 2 * products, 1
            ),
        ],
    )


def _best(num_codebooks: int, num_codes: int, chip: str) -> Case:
    """The 50 best tokens of each of 8 positions, and log Z: a step of decoding."""
    from vqcx_jax.ops.codebook.streaming import tpu

    num_positions = 8

    def best(l_NxMK: jax.Array, codes: jax.Array, bias: jax.Array) -> Any:
        code_logits = tuple(jnp.split(l_NxMK, num_codebooks, axis=1))
        return tpu.top_k(code_logits, codes, 50, bias)

    products = 16 * V * num_codebooks * num_codes * 3  # A register's rows, and float32 in parts.
    return Case(
        best,
        (),
        [
            ((num_positions, num_codebooks * num_codes), "float32"),
            ((V, num_codebooks), "int32"),
            ((V,), "float32"),
        ],
        [Kernel("vqcx_codebook_top_k", (1, 1), products, 2)],
    )


def _classes(num_codebooks: int, num_codes: int, chip: str) -> Case:
    """As in ladder_1b, with 16 codebooks of 256: 1432 frequent tokens, as many classes of 89."""
    from vqcx_jax.ops.codebook import classes

    num_classes, num_ranks = 1432, 89
    num_nodes = V + num_classes

    def loss(
        h: jax.Array,
        codebooks: jax.Array,
        scale: jax.Array,
        bias: jax.Array,
        *rest: jax.Array,
    ) -> jax.Array:
        *codes, entries, entry_of, members, rank_of, targets = rest
        tokens = entries, entry_of, members, rank_of
        weights = classes.Weights(codebooks, classes.Codes(*codes), scale, bias)
        return classes.summed_nll(
            h,
            weights,
            classes.Classes(*tokens),
            targets,
            targets >= 0,
            implementation="pallas_tpu",
            product_dtype="bfloat16",
        )

    # At most: as if each class occurred. A class that does not has no tile.
    tiles = N // 16 + num_classes
    products = N * num_ranks * num_codebooks * num_codes
    kernels = [
        _resident(2 * num_classes),
        Kernel("vqcx_members_forward", (tiles,), products),
        Kernel("vqcx_members_backward", (tiles,), 2 * products),
    ]
    tokens = [
        ((2 * num_classes,), "int32"),
        ((V,), "int32"),
        ((num_classes, num_ranks), "int32"),
        ((V,), "int32"),
    ]
    return Case(
        loss,
        (0, 1, 2, 3),
        [
            ((N, D), "bfloat16"),
            ((num_codebooks, num_codes, D // num_codebooks), "bfloat16"),
            ((num_nodes,), "float32"),
            ((num_nodes,), "float32"),
            ((num_nodes, num_codebooks), "uint8"),
            ((2 * num_classes, num_codebooks), "uint8"),
            ((num_classes, num_codebooks, num_ranks), "uint8"),
            *tokens,
            ((N,), "int32"),
        ],
        kernels,
    )


def _one_codebook(implementation: str, chip: str) -> Case:
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
        loss,
        (0, 1, 4),
        [
            ((N, D), "bfloat16"),
            ((1280, D), "bfloat16"),
            ((V,), "int32"),
            ((N,), "int32"),
            ((V,), "float32"),
        ],
        [_resident(1280)] if implementation == "pallas_tpu" else [],
    )


def _two_codebooks(implementation: str, chip: str) -> Case:
    """M = 2, additive, in closed form: sqrt(V) codes each."""
    from vqcx_jax.ops.codebook import loss as codebook_loss

    num_codes, num_products = 359, 3

    def loss(
        h: jax.Array,
        first: jax.Array,
        second: jax.Array,
        assignment: jax.Array,
        targets: jax.Array,
        bias: jax.Array,
    ) -> jax.Array:
        codebooks = first, second
        sums = codebook_loss.summed_nll(
            h, codebooks, assignment, targets, targets >= 0, bias, implementation=implementation
        )
        return sums[0]

    # Products of cells are of float32 numbers, which go as bfloat16 parts.
    products = 3 * N * (2 * num_codes * D + num_products * num_codes**2)
    kernels = [Kernel("vqcx_two_codebooks", (1,), products)]
    return Case(
        loss,
        (0, 1, 2, 5),
        [
            ((N, D), "bfloat16"),
            ((num_codes, D), "bfloat16"),
            ((num_codes, D), "bfloat16"),
            ((V, 2), "int32"),
            ((N,), "int32"),
            ((V,), "float32"),
        ],
        kernels if implementation == "pallas_tpu" else [],
    )


def _tokamax(chip: str) -> Case:
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
    forward, backward = {
        "v5p": (logits, (0, *gradients)),
        "v6e": ((*logits, 0, 0), (0, 0, 0, *gradients)),
    }[chip]
    return Case(
        loss,
        (0, 1),
        [((N, D), "bfloat16"), ((D, V), "bfloat16"), ((N,), "int32")],
        [
            Kernel("lce_fwd", forward, N * V * D),
            Kernel("lce_bwd", backward, 3 * N * V * D),
        ],
    )


def _per_core(chip: str, executions: dump.Executions, times: int = 1) -> dump.Executions:
    """A core's share of executions, which are as many times as often as is said."""
    share = times / CORES[chip]
    return tuple(
        dump.Nested(share * n.runs, [share * x for x in n.inside])
        if isinstance(n, dump.Nested)
        else share * n
        for n in executions
    )


def _attention(
    kind: str,
    width: int,
    chip: str,
    blocks: Any = None,
    *,
    length: int = T,
    is_packed: bool = False,
) -> Case:
    """Raw queries and keys, T of them in rows of `length`; causal.

    Args:
        is_packed: rows hold documents (`documents.packed_rows`); else one each.
    """
    from vqcx_jax.ops.flash_attention import amplitude, block_sizes, tpu

    amplitudes: dict[str, amplitude.Amplitude] = {"pope": "softplus", "amplitude": "modulus"}
    num_planes = amplitude.num_planes(width, amplitudes.get(kind))
    if blocks is None:
        blocks = block_sizes.block_sizes(KINDS[chip], width, is_packed=is_packed)

    def loss(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        frequencies: jax.Array,
        delta: jax.Array,
        bias: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        y = tpu.attend(
            q,
            k,
            v,
            frequencies=frequencies,
            delta=delta if kind == "complex" else None,
            bias=None if kind == "rope" else bias,
            positions=positions,
            segment_ids=segment_ids,
            scale=width**-0.5,
            amplitude=amplitudes.get(kind),
            block_sizes=blocks,
        )
        return jnp.sum(y.astype(jnp.float32))

    batch = T // length
    heads = ((batch, length, H, width), "bfloat16")
    planes, ids = ((H, num_planes), "float32"), ((batch, length), "int32")
    rows = documents.packed_rows(length) if is_packed else None
    pairs = length * (length + 1) / 2 if rows is None else documents.pairs(rows)
    of_scores, of_values = (H * batch * pairs * x for x in (2 * num_planes, width))
    return Case(
        loss,
        (0, 1, 2, 4, 5),
        [
            *[heads] * 3,
            ((num_planes,), "float32"),
            planes,
            planes,
            ids,
            *([ids] if is_packed else []),
        ],
        _flash_kernels(
            blocks, chip, length, rows, of_scores + of_values, 3 * of_scores + 2 * of_values
        ),
    )


def _flash_kernels(
    blocks: Any, chip: str, length: int, rows: Any, forward: float, backward: float
) -> list[Kernel]:
    """Of our attention, by the products of its forward and its backward pass."""
    sizes = (blocks.block_q, blocks.block_kv), (blocks.block_q_backward, blocks.block_kv_backward)
    tiles_forward = _of_plan(*sizes[0], False, length, rows)
    tiles_backward = _of_plan(*sizes[1], True, length, rows)
    return [
        Kernel("vqcx_flash_fwd", _per_core(chip, tiles_forward, H), forward),
        Kernel("vqcx_flash_bwd", _per_core(chip, tiles_backward, H), backward),
    ]


def _triangle(width: int) -> float:
    """Products of queries and keys that are not hidden, all heads."""
    return H * T * (T + 1) / 2 * width


def _of_plan(block_q: int, block_kv: int, is_backward: bool, length: int, rows: Any) -> list[float]:
    """Executions for a head: turning queries or keys, each kind of tile, finishing."""
    from vqcx_jax.ops.flash_attention import tiles, tpu_common

    visible = tiles.visible(True, None, length)
    plan = tiles.make_plan(visible, length, block_q, block_kv, range(length // block_kv))
    shares = np.ones(plan.num_steps)
    if rows is not None:
        meeting = tpu_common.meeting_tiles(rows[:, None], plan, block_q, block_kv)
        shares = np.mean(np.asarray(meeting, np.float64), axis=0)
    kinds = plan.code >> tiles.KIND_SHIFT
    of_kind = [T // length * float(sum(shares[kinds == i])) for i in range(len(plan.kinds))]
    is_nested = rows is not None and len(of_kind) > 1
    of_kinds = [dump.Nested(sum(of_kind), of_kind)] if is_nested else of_kind
    num_rows, num_columns = T // block_q, T // block_kv
    if is_backward:
        return [num_columns, num_rows, *of_kinds, num_rows, num_columns]
    return [num_rows, num_columns, *of_kinds, num_rows]


def _splash(chip: str) -> Case:
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
        loss,
        (0, 1, 2),
        [heads] * 3,
        [
            Kernel("splash_mha_fwd", _per_core(chip, of_head, H), 2 * _triangle(HEAD_DIM)),
            Kernel("splash_mha_dkv", _per_core(chip, of_head, H), 5 * _triangle(HEAD_DIM)),
        ],
    )


def _decode(num_kv_heads: int, width: int, implementation: str, chip: str) -> Case:
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
    products = 2 * batch * length * H * width
    kernels = [Kernel("vqcx_flash_decoding", _per_core(chip, (batch * blocks, 0)), products)]
    return Case(
        step,
        (),
        [((batch, 1, H, width), "bfloat16"), cache, cache, ((), "int32")],
        kernels if implementation == "pallas_tpu" else [],
    )


# Of a chip; the first ones, and attention that is ours, also of block sizes.
CASES: dict[str, Callable[..., Case]] = {
    "log_z 16x16": functools.partial(_streamed, 16, 16, "bfloat16", False),
    "log_z 16x16, scales": functools.partial(_streamed, 16, 16, "bfloat16", True),
    "log_z 16x16, float32": functools.partial(_streamed, 16, 16, "float32", False),
    "top_k 16x16": functools.partial(_best, 16, 16),
    "classes 16x256": functools.partial(_classes, 16, 256),
    "classes 64x16": functools.partial(_classes, 64, 16),
    "classes 64x64": functools.partial(_classes, 64, 64),
    "one codebook": functools.partial(_one_codebook, "pallas_tpu"),
    "one codebook, XLA": functools.partial(_one_codebook, "xla"),
    "two codebooks": functools.partial(_two_codebooks, "pallas_tpu"),
    "two codebooks, XLA": functools.partial(_two_codebooks, "xla"),
    "full, tokamax": _tokamax,
    **{
        f"attention, {name}{of_width}": functools.partial(_attention, kind, width)
        for kind, name in ATTENTION.items()
        for width, of_width in ((HEAD_DIM, ""), (64, ", width 64"))
    },
    "attention, PoPE, packed": functools.partial(
        _attention, "pope", HEAD_DIM, length=4096, is_packed=True
    ),
    "attention, PoPE, width 64, packed": functools.partial(
        _attention, "pope", 64, length=2048, is_packed=True
    ),
    "attention, splash": _splash,
    "decode, 4 key heads": functools.partial(_decode, 4, 128, "pallas_tpu"),
    "decode, 16 key heads": functools.partial(_decode, 16, 128, "pallas_tpu"),
    "decode, 4 of width 64": functools.partial(_decode, 4, 64, "pallas_tpu"),
    "decode, 4 key heads, XLA": functools.partial(_decode, 4, 128, "xla"),
}
