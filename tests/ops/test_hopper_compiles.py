"""Kernels for Hopper through the real compiler, for H100s that are not here.

It needs packages of 1.3 GB (`pip install '.[hopper-compiler]'`); without them it is skipped.
"""

from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.nn.attention.base import HEADS, PER_HEAD
from vqcx_jax.nn.layers import ROWS
from vqcx_jax.ops import attention, device, dispatch, softmax
from vqcx_jax.ops.codebook import streaming
from vqcx_jax.ops.euler_turn import queries_and_keys
from vqcx_jax.sharding import make_mesh, partition_spec, per_device

pytestmark = pytest.mark.skipif(
    find_spec("jax_cuda13_plugin") is None or find_spec("nvidia") is None,
    reason="needs the CUDA compiler: pip install '.[hopper-compiler]'",
)

# What the compiler needs to know of an H100, from its data sheet and the CUDA programming guide.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 clock_rate_ghz: 1.98
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def mesh_of(num_devices: int) -> jax.sharding.Mesh:
    from jax.experimental import topologies

    shape = f"1x1x{num_devices}"
    described = topologies.get_topology_desc(
        platform="cuda", topology_name=shape, topology=shape, target_config=H100
    )
    axes = {"data": num_devices // 2, "tensor": 2} if num_devices > 1 else {}
    return make_mesh(axes, "auto", described.devices)


def compiled(function: Any, mesh: jax.sharding.Mesh, args: Any, axes: Any) -> Any:
    described = [
        jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, partition_spec(a, ShardingRules()))
        )
        for x, a in zip(args, axes, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert device.current() == device.Device("gpu", "NVIDIA H100 80GB HBM3")
        traced = jax.jit(function).trace(*described)
        return traced.lower(lowering_platforms=("cuda",)).compile()


@pytest.mark.parametrize("num_codes", [(40, 60, 80), (16,) * 16])
def test_log_z(num_codes: tuple[int, ...]) -> None:
    """Values and gradients, with scales."""
    num_positions, vocab_size = 1000, 5003
    code_logits = tuple(jnp.zeros((num_positions, n)) for n in num_codes)
    args = (jnp.zeros((vocab_size, len(num_codes)), jnp.int32), *jnp.zeros((2, vocab_size)))

    def loss(*args: jax.Array) -> jax.Array:
        codes, bias, scale, *code_logits = args
        options = {"implementation": "mosaic_gpu", "product_dtype": "bfloat16"}
        return jnp.sum(streaming.log_z(tuple(code_logits), codes, bias, scale, **options))

    gradients = jax.grad(loss, tuple(range(1, 3 + len(num_codes))))
    arrays = (*args, *code_logits)
    program = compiled(gradients, mesh_of(1), arrays, [(None,) * x.ndim for x in arrays])
    assert program.as_text().count("mosaic_gpu") >= 2


def test_streamed_softmax() -> None:
    """A quarter of the memory of all logits, in eight steps: one loop, of blocks of positions."""
    num_positions, dim, vocab_size = 8192, 2048, 128_256
    args = (
        jax.ShapeDtypeStruct((num_positions, dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((vocab_size, dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((num_positions,), jnp.int32),
        jax.ShapeDtypeStruct((num_positions,), bool),
    )

    def streamed(*args: jax.Array) -> jax.Array:
        return softmax.summed_nll(*args)[0]

    def plain(h: jax.Array, weights: jax.Array, targets: jax.Array, counts: jax.Array) -> jax.Array:
        return jnp.sum(softmax.nll(h, weights, targets)[0], where=counts)

    programs = [
        compiled(jax.value_and_grad(f, (0, 1)), mesh_of(1), args, [(None,) * x.ndim for x in args])
        for f in (streamed, plain)
    ]
    of_streamed, of_plain = (p.memory_analysis().temp_size_in_bytes for p in programs)
    assert of_streamed < of_plain / 4
    assert programs[0].as_text().count("while(") == 1


@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize("head_dim, dtype", [(32, "float32"), (64, "bfloat16"), (128, "bfloat16")])
def test_turn(head_dim: int, dtype: str, num_devices: int) -> None:
    """Values and gradients; lengths that are no multiple of a tile."""
    q, k = (jnp.zeros((2, 1000, heads, head_dim), dtype) for heads in (4, 2))
    positions = jnp.zeros((2, 1000), jnp.int32)
    table = attention.rotary_table(positions, attention.rope_frequencies(head_dim))
    args = (q, k, *table, jnp.zeros((2, head_dim // 2)), jnp.zeros((4, head_dim // 2)))
    axes = (HEADS, HEADS, (*ROWS, None), (*ROWS, None), PER_HEAD, PER_HEAD)
    turn = per_device(queries_and_keys, axes, (HEADS, HEADS), ShardingRules())

    def loss(*args: jax.Array) -> jax.Array:
        return sum(jnp.sum(x, dtype=jnp.float32) ** 2 for x in turn(*args))

    mesh = mesh_of(num_devices)
    with dispatch.record() as traced:
        program = compiled(jax.grad(loss, (0, 1, 4, 5)), mesh, args, axes).as_text()
    assert traced == [("euler_turn.queries_and_keys", "mosaic_gpu")]
    assert program.count("mosaic_gpu") >= 4  # Forward and backward, of queries and keys.
