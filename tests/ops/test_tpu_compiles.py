"""The TPU kernels through the real compiler, for chips that are not here: one, and several.

All of it is in one file, because only one process at a time may use libtpu.
"""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from vqcx_jax.ops import device, dispatch
from vqcx_jax.ops.codebook import scatter, streaming

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
N, V, M, K = 2000, 5003, 3, 40  # No multiple of anything.


@pytest.fixture(scope="module", autouse=True)
def compiler() -> Iterator[None]:
    pytest.importorskip("libtpu")
    machine = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in machine.items():
            patch.setitem(os.environ, name, value)
        yield


def log_z(dtype: str, *arrays: Any) -> Any:
    code_logits, codes, bias, scale = arrays
    z = streaming.log_z(code_logits, codes, bias, scale, product_dtype=dtype)
    return z


def logits(dtype: str, *arrays: Any) -> Any:
    code_logits, codes, bias, scale = arrays
    return scatter.logits(
        code_logits, codes, bias, scale, soft_cap=30.0, dtype=dtype, product_dtype=dtype
    )


OPERATIONS: dict[str, Callable[..., Any]] = {"log_z": log_z, "logits": logits}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_codebook_kernels(chip: str, operation: str, dtype: str) -> None:
    """Forward and backward; in float32 on four chips, each with its share of the positions."""
    from jax.experimental import topologies

    num_chips = 4 if dtype == "float32" else 1
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh(
        (num_chips,), ("data",), devices=topology.devices[:num_chips], axis_types=explicit
    )
    run = functools.partial(OPERATIONS[operation], dtype)

    def loss(*arrays: Any) -> jax.Array:
        rows, whole = jax.P("data"), jax.P()
        result = jax.shard_map(run, in_specs=(rows, whole, whole, whole), out_specs=rows)(*arrays)
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(result))

    def abstract(shape: tuple[int, ...], dtype: str, spec: Any) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    with jax.set_mesh(mesh), dispatch.record() as traced:
        assert device.current() == device.Device("tpu", chip)
        arguments = (
            (abstract((N, K), "float32", jax.P("data", None)),) * M,
            abstract((V, M), "int32", jax.P(None, None)),
            *[abstract((V,), "float32", jax.P(None))] * 2,
        )
        traced_loss = jax.jit(jax.value_and_grad(loss, (0, 2, 3))).trace(*arguments)
        compiled = traced_loss.lower(lowering_platforms=("tpu",)).compile()
    assert {name for _, name in traced} == {"pallas_tpu"}
    assert compiled.as_text().count("tpu_custom_call") >= 2
    if operation == "log_z":  # Never N V logits.
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * N * V / num_chips / 4
