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
from flax import nnx
from versions import newest_jax, oldest_jax

from vqcx_jax.config import schema
from vqcx_jax.nn import KVCache, Transformer, functional
from vqcx_jax.ops import codebook, device, dispatch, flash_attention, flash_decoding
from vqcx_jax.ops.codebook import classes, scatter, streaming

pytestmark = pytest.mark.usefixtures("fully_optimized")  # As users compile it.

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def chips_and_dtypes(further_chip: str) -> Any:
    """Two chips for every kernel, and a third one: between them they see all four."""
    return pytest.mark.parametrize(
        ("chip", "dtype"),
        [
            pytest.param("v5p", "bfloat16", marks=oldest_jax),
            pytest.param("v6e", "float32", marks=newest_jax),
            pytest.param(further_chip, "bfloat16", marks=newest_jax),
        ],
    )


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
        patch.delenv("XLA_FLAGS", raising=False)  # Unknown to this compiler, which ends at that.
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


def mesh_of(chip: str, num_chips: int) -> jax.sharding.Mesh:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    explicit = (jax.sharding.AxisType.Explicit,)
    return jax.make_mesh((num_chips,), ("data",), devices=devices[:num_chips], axis_types=explicit)


def compile_for(function: Any, *arguments: Any, num_kernels: int = 2) -> Any:
    """Compiles; asserts that it was kernels that were traced, and at least how many."""
    with dispatch.record() as traced:
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    assert {name for _, name in traced} == {"pallas_tpu"}
    assert lowered.as_text().count("tpu_custom_call") >= num_kernels
    return lowered.compile()


def abstract(shape: tuple[int, ...], dtype: str, spec: Any = None) -> jax.ShapeDtypeStruct:
    """On the current mesh."""
    sharding = jax.sharding.NamedSharding(
        jax.sharding.get_mesh(), spec or jax.P(*[None] * len(shape))
    )
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


@pytest.mark.parametrize("operation", OPERATIONS)
@chips_and_dtypes("v5e")
def test_codebook_kernels(chip: str, operation: str, dtype: str) -> None:
    """Forward and backward; in float32 on four chips, each with its share of the positions."""
    num_chips = 4 if dtype == "float32" else 1
    run = functools.partial(OPERATIONS[operation], dtype)

    def loss(*arrays: Any) -> jax.Array:
        rows, whole = jax.P("data"), jax.P()
        result = jax.shard_map(run, in_specs=(rows, whole, whole, whole), out_specs=rows)(*arrays)
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(result))

    with jax.set_mesh(mesh_of(chip, num_chips)):
        assert device.current().platform == "tpu"
        compiled = compile_for(
            jax.value_and_grad(loss, (0, 2, 3)),
            (abstract((N, K), "float32", jax.P("data", None)),) * M,
            abstract((V, M), "int32"),
            abstract((V,), "float32"),
            abstract((V,), "float32"),
        )
    if operation == "log_z":  # Never N V logits.
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * N * V / num_chips / 4


@chips_and_dtypes("tpu7x")
def test_one_codebook(chip: str, dtype: str) -> None:
    """The summed loss with a cap; in float32 on four chips. Never N K numbers."""
    num_chips, num_codes, dim = 4 if dtype == "float32" else 1, 1290, 256
    num_positions = 16_000

    def sums(*arrays: Any) -> jax.Array:
        loss, _ = codebook.summed_nll(*arrays, 0.1, cap=30.0)
        return jax.lax.psum(loss, "data")

    def loss(*arrays: Any) -> jax.Array:
        rows, whole = jax.P("data"), jax.P()
        in_specs = (rows, whole, whole, rows, rows, whole)
        return jax.shard_map(sums, in_specs=in_specs, out_specs=whole)(*arrays)

    with jax.set_mesh(mesh_of(chip, num_chips)):
        compiled = compile_for(
            jax.value_and_grad(loss, (0, 1, 5)),
            abstract((num_positions, dim), dtype, jax.P("data", None)),
            abstract((num_codes, dim), dtype),
            abstract((V,), "int32"),
            abstract((num_positions,), "int32", jax.P("data")),
            abstract((num_positions,), "bool", jax.P("data")),
            abstract((V,), "float32"),
            num_kernels=1,
        )
    of_logits = 4 * num_positions * num_codes / num_chips
    assert compiled.memory_analysis().temp_size_in_bytes < of_logits


@chips_and_dtypes("v5e")
def test_two_codebooks(chip: str, dtype: str) -> None:
    """The summed loss with a cap; in float32 product codes, on four chips."""
    num_chips, form = (4, "product") if dtype == "float32" else (1, "additive")
    num_codes, dim, num_positions = 150, 256, 2000

    def sums(*arrays: Any) -> jax.Array:
        loss, _ = codebook.loss.summed_nll(*arrays, 0.1, form=form, cap=30.0)
        return jax.lax.psum(loss, "data")

    def loss(*arrays: Any) -> jax.Array:
        rows, whole = jax.P("data"), jax.P()
        in_specs = (rows, whole, whole, rows, rows, whole)
        return jax.shard_map(sums, in_specs=in_specs, out_specs=whole)(*arrays)

    width = dim // 2 if form == "product" else dim
    with jax.set_mesh(mesh_of(chip, num_chips)):
        compile_for(
            jax.value_and_grad(loss, (0, 1, 5)),
            abstract((num_positions, dim), dtype, jax.P("data", None)),
            (abstract((num_codes, width), dtype),) * 2,
            abstract((V, 2), "int32"),
            abstract((num_positions,), "int32", jax.P("data")),
            abstract((num_positions,), "bool", jax.P("data")),
            abstract((V,), "float32"),
            num_kernels=1,
        )


@chips_and_dtypes("tpu7x")
def test_classes(chip: str, dtype: str) -> None:
    """The loss of product codes in classes; never N R M numbers, R the members of a class."""
    num_codebooks, num_codes, dim, num_classes, num_ranks = 4, 40, 64, 50, 130

    def loss(h: Any, codebooks: Any, scale: Any, bias: Any, *rest: Any) -> jax.Array:
        weights = classes.Weights(codebooks, classes.Codes(*rest[:3]), scale, bias)
        in_classes, targets = classes.Classes(*rest[3:-1]), rest[-1]
        counts = targets > 0
        return classes.summed_nll(h, weights, in_classes, targets, counts, product_dtype=dtype)

    with jax.set_mesh(mesh_of(chip, 1)):
        nodes = V + num_classes
        compile_for(
            jax.value_and_grad(loss, (0, 1, 2, 3)),
            abstract((N, dim), dtype),
            abstract((num_codebooks, num_codes, dim // num_codebooks), dtype),
            abstract((nodes,), "float32"),
            abstract((nodes,), "float32"),
            abstract((nodes, num_codebooks), "uint8"),
            abstract((60 + num_classes, num_codebooks), "uint8"),
            abstract((num_classes, num_codebooks, num_ranks), "uint8"),
            abstract((60 + num_classes,), "int32"),
            abstract((V,), "int32"),
            abstract((num_classes, num_ranks), "int32"),
            abstract((V,), "int32"),
            abstract((N,), "int32"),
        )


@pytest.mark.parametrize(
    ("chip", "width", "amplitude"),
    [
        ("v5e", 64, "softplus"),
        pytest.param("v5p", 128, None, marks=newest_jax),
        pytest.param("v6e", 256, "softplus", marks=newest_jax),
        pytest.param("tpu7x", 128, "modulus", marks=newest_jax),
    ],
)
def test_flash_attention(chip: str, width: int, amplitude: Any) -> None:
    """Ragged, grouped, with everything that there is; on v6e four chips, each with a row."""
    length, num_heads, num_kv_heads, num_chips = 1500, 4, 2, 4 if chip == "v6e" else 1
    num_planes = width if amplitude == "softplus" else width // 2

    def attend(q: Any, k: Any, v: Any, phases: Any, positions: Any, segment_ids: Any) -> jax.Array:
        return flash_attention.attend(
            q,
            k,
            v,
            **phases,
            positions=positions,
            segment_ids=segment_ids,
            scale=0.1,
            amplitude=amplitude,
            window=1000,
            soft_cap=50.0,
        )

    def loss(*arrays: Any) -> jax.Array:
        rows, whole = jax.P("data"), jax.P()
        in_specs = (rows, rows, rows, whole, rows, rows)
        y = jax.shard_map(attend, in_specs=in_specs, out_specs=rows)(*arrays)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh_of(chip, num_chips)):
        of_key_heads = abstract((num_kv_heads, num_planes), "float32")
        phases = {
            # On v6e each key head has its own; else cosines and sines come from outside.
            "frequencies": of_key_heads if chip == "v6e" else abstract((num_planes,), "float32"),
            "delta": of_key_heads if amplitude is None else None,
            "bias": abstract((num_heads, num_planes), "float32"),
        }
        ids = abstract((num_chips, length), "int32", jax.P("data", None))
        of_row = jax.P("data", None, None, None)
        kv = abstract((num_chips, length, num_kv_heads, width), "bfloat16", of_row)
        q = abstract((num_chips, length, num_heads, width), "bfloat16", of_row)
        compile_for(jax.value_and_grad(loss, (0, 1, 2, 3)), q, kv, kv, phases, ids, ids)


@pytest.mark.parametrize(
    ("chip", "width", "num_kv_heads", "num_queries", "dtype"),
    [
        ("v5e", 64, 2, 1, "bfloat16"),
        ("v5p", 128, 4, 1, "bfloat16"),
        pytest.param("v6e", 256, 8, 16, "bfloat16", marks=newest_jax),
        pytest.param("v5p", 32, 1, 3, "float32", marks=newest_jax),
        pytest.param("v6e", 128, 2, 3, "float32", marks=newest_jax),
        pytest.param("v5p", 128, 1, 1, "bfloat16", marks=newest_jax),
        pytest.param("tpu7x", 128, 8, 1, "bfloat16", marks=newest_jax),
    ],
)
def test_flash_decoding(
    chip: str, width: int, num_kv_heads: int, num_queries: int, dtype: str
) -> None:
    """Ragged, with everything that there is; of the cache there is no copy."""
    length, num_heads = 10_000, 8

    def step(q: Any, k: Any, v: Any, slopes: Any, first: Any, layer: Any) -> jax.Array:
        return flash_decoding.attend(
            q, k, v, first, layer=layer, scale=0.1, window=5000, soft_cap=50.0, slopes=slopes
        )

    with jax.set_mesh(mesh_of(chip, 1)):
        q = abstract((2, num_queries, num_heads, width), dtype)
        kv = abstract((3, 2, length, num_kv_heads, width), dtype)
        scalar = abstract((), "int32")
        slopes = abstract((num_heads,), "float32")
        compiled = compile_for(step, q, kv, kv, slopes, scalar, scalar, num_kernels=1)
    of_layer = kv.size * kv.dtype.itemsize / 3
    assert compiled.memory_analysis().temp_size_in_bytes < of_layer / 4


@pytest.mark.parametrize("width", [128, pytest.param(64, marks=newest_jax)])
def test_decoding_step_of_a_model(width: int) -> None:
    """The cache of all layers is written and read where it lies: no layer's is copied."""
    config = schema.Model(
        vocab_size=1000,
        embed_dim=256,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_dim=width,
        mlp_dim=512,
        attention=schema.ComplexAttention(),
        head=schema.FullHead(),
        dtype="bfloat16",
    )
    rules = schema.ShardingRules(**dict.fromkeys(schema.ShardingRules.__annotations__, ()))
    model = nnx.eval_shape(lambda: Transformer(config, rules=rules, rngs=nnx.Rngs(0)))
    graphdef, *trees = functional.split(model)

    def step(trees: Any, tokens: Any, cache: Any, first: Any) -> Any:
        return nnx.merge(graphdef, *trees).extend(tokens, cache, first)

    with jax.set_mesh(mesh_of("v5p", 1)):
        trees = jax.tree.map(lambda x: abstract(x.shape, x.dtype), trees)
        kv = abstract((3, 8, 8192, 4, width), "bfloat16")
        inputs = abstract((8, 1), "int32"), KVCache(kv, kv), abstract((), "int32")
        with dispatch.record() as traced:
            step_of_donated = jax.jit(step, donate_argnums=2).trace(trees, *inputs)
        compiled = step_of_donated.lower(lowering_platforms=("tpu",)).compile()
    assert traced == [("flash_decoding.attend", "pallas_tpu")]
    memory, size = compiled.memory_analysis(), kv.size * kv.dtype.itemsize
    assert memory.alias_size_in_bytes >= 2 * size
    assert memory.temp_size_in_bytes < size / 3


@newest_jax
def test_one_layer_is_copied_at_most() -> None:
    """Where a TPU lays a cache out in another way: of an odd length, here."""
    kv_shape = (16, 2, 10_001, 4, 128)

    def step(q: Any, k: Any, v: Any, first: Any, layer: Any) -> jax.Array:
        return flash_decoding.attend(q, k, v, first, layer=layer, scale=0.1)

    with jax.set_mesh(mesh_of("v5p", 1)):
        kv, scalar = abstract(kv_shape, "bfloat16"), abstract((), "int32")
        q = abstract((2, 1, 8, 128), "bfloat16")
        compiled = compile_for(step, q, kv, kv, scalar, scalar, num_kernels=1)
    of_layer = kv.size * kv.dtype.itemsize / kv_shape[0]
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * of_layer


@pytest.mark.parametrize("chip", ["v5p", "v6e"])
def test_best_tokens(chip: str) -> None:
    """Of a few positions and of many codes, with scales."""
    num_positions, num_codes, vocab_size = 8, 256, 100_000

    def best(*arrays: Any) -> Any:
        code_logits, codes, bias, scale = arrays
        return streaming.top_k(code_logits, codes, 50, bias, scale)

    with jax.set_mesh(mesh_of(chip, 1)):
        compile_for(
            best,
            (abstract((num_positions, num_codes), "float32"),) * 16,
            abstract((vocab_size, 16), "int32"),
            abstract((vocab_size,), "float32"),
            abstract((vocab_size,), "float32"),
            num_kernels=1,
        )


@newest_jax
def test_largest_tiles_of_codes() -> None:
    """They fit vector memory with as many tokens and scales as there may be, in float32."""
    num_positions, num_codes, vocab_size = 8192, 64, 2**20

    def loss(*arrays: Any) -> jax.Array:
        return jnp.sum(log_z("float32", *arrays))

    with jax.set_mesh(mesh_of("v6e", 1)):
        compile_for(
            jax.value_and_grad(loss, (0, 2, 3)),
            (abstract((num_positions, num_codes), "float32"),) * 4,
            abstract((vocab_size, 4), "int32"),
            abstract((vocab_size,), "float32"),
            abstract((vocab_size,), "float32"),
        )


@newest_jax
def test_largest_tiles_of_attention() -> None:
    """One document, float32, with amplitudes, which have the most planes."""
    shape, planes = (1, 4096, 1, 128), (1, 128)

    def loss(q: Any, k: Any, v: Any, bias: Any, positions: Any) -> jax.Array:
        y = flash_attention.attend(
            q,
            k,
            v,
            frequencies=jnp.ones(planes),
            delta=None,
            bias=bias,
            positions=positions,
            segment_ids=None,
            scale=0.1,
            amplitude="softplus",
        )
        return jnp.sum(y)

    with jax.set_mesh(mesh_of("v6e", 1)):
        compile_for(
            jax.value_and_grad(loss, (0, 1, 2, 3)),
            *(abstract(shape, "float32"),) * 3,
            abstract(planes, "float32"),
            abstract(shape[:2], "int32"),
        )
