"""The same numbers on every mesh, and arrays that lie where the rules say."""

import dataclasses
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec
from versions import oldest_jax

from vqcx_jax import sharding
from vqcx_jax.config import schema
from vqcx_jax.evaluation.generation import generate
from vqcx_jax.nn import Transformer, functional
from vqcx_jax.nn.loss import summed_nll
from vqcx_jax.ops.hierarchical import huffman_paths

RULES = schema.ShardingRules()
SEQUENCE_RULES = dataclasses.replace(RULES, sequence=("sequence",))
MESHES = {
    "data8": {"data": 8, "fsdp": 1, "tensor": 1},
    "fsdp8": {"data": 1, "fsdp": 8, "tensor": 1},
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor4": {"data": 1, "fsdp": 1, "tensor": 4},
    "fsdp2_tensor2_sequence2": {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2},
    "sequence3": {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 3},
}
AXIS_TYPES = ("explicit", "auto")
# Attention and head do not meet: each of them in one model is enough.
MODELS: dict[str, dict[str, Any]] = {
    "complex_vq": {"attention": schema.ComplexAttention(), "head": schema.VQHead(num_codes=8)},
    "rope_full": {"attention": schema.RopeAttention(), "head": schema.FullHead(token_bias=True)},
    "complex_full": {"attention": schema.ComplexAttention(), "head": schema.FullHead()},
    "rope_tied_streamed": {
        "attention": schema.RopeAttention(),
        "head": schema.FullHead(
            tied=True, implementation="streamed", token_bias=True, logit_soft_cap=3.0
        ),
    },
    "rope_low_rank": {
        "attention": schema.RopeAttention(),
        "head": schema.LowRankHead(rank=6, token_bias=True),
    },
    "rope_adaptive": {
        "attention": schema.RopeAttention(),
        "head": schema.AdaptiveHead(cutoffs=(4, 10), head_bias=True),
    },
    "rope_two_level": {"attention": schema.RopeAttention(), "head": schema.HierarchicalHead()},
    "rope_huffman": {
        "attention": schema.RopeAttention(),
        "head": schema.HierarchicalHead(tree="huffman"),
    },
    "rope_vq": {
        "attention": schema.RopeAttention(),
        "head": schema.VQHead(num_codes=8, token_bias=False),
    },
}
BASELINES = (
    "rope_low_rank",
    "rope_adaptive",
    "rope_two_level",
    "rope_huffman",
)
# Of the mesh test.
FURTHER_CASES = [
    ("complex_vq", "data2_fsdp2_tensor2", "auto"),
    *(("complex_vq", mesh, "explicit") for mesh in MESHES if mesh != "data2_fsdp2_tensor2"),
    ("rope_full", "data2_fsdp2_tensor2", "explicit"),
    ("rope_full", "tensor4", "explicit"),
    ("complex_vq", "data8", "auto"),
    ("rope_full", "tensor4", "auto"),
    ("rope_full", "sequence3", "explicit"),
    ("rope_full", "sequence3", "auto"),
    *((name, "data2_fsdp2_tensor2", "explicit") for name in BASELINES),
    ("rope_tied_streamed", "data2_fsdp2_tensor2", "auto"),
    ("rope_adaptive", "data2_fsdp2_tensor2", "auto"),
]


def make_mesh(name: str, axis_type: str) -> Mesh:
    shape = MESHES[name]
    count = int(np.prod(list(shape.values())))
    return sharding.make_mesh(shape, axis_type, jax.devices()[:count])


@cache
def make_model(
    name: str, rules: schema.ShardingRules = RULES, dtype: Any = "float32", remat: Any = "none"
) -> Transformer:
    """Every parameter is random, the same for all rules, and numpy's: on no mesh yet."""
    config = schema.Model(
        vocab_size=24,
        embed_dim=16,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=4,
        mlp_dim=32,
        dtype=dtype,
        remat=remat,
        **MODELS[name],
    )
    graphdef, params, buffers = functional.split(
        nnx.eval_shape(lambda: Transformer(config, rules=rules, rngs=nnx.Rngs(0)))
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: (0.4 * rng.standard_normal(p.shape)).astype(p.dtype), params)
    return nnx.merge(graphdef, params, jax.tree.map(lambda _: token_map(config.head), buffers))


def token_map(head: Any) -> np.ndarray:
    """Codes, paths or ranks of the 24 tokens."""
    if isinstance(head, schema.VQHead):
        return np.arange(24, dtype=np.int32) % head.num_codes
    if head == schema.HierarchicalHead(tree="huffman"):
        return huffman_paths(np.arange(24))
    return np.arange(24, dtype=np.int32)[::-1]


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "inputs": rng.integers(24, size=(8, 6), dtype=np.int32),
        "targets": rng.integers(24, size=(8, 6), dtype=np.int32),
        "segment_ids": np.asarray([[1, 1, 2, 2, 2, 0]] * 8, np.int32),
        "positions": np.asarray([[0, 1, 0, 1, 2, 0]] * 8, np.int32),
    }


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(graphdef: Any, params: Any, buffers: Any, batch: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        return summed_nll(graphdef, params, buffers, batch, z_loss=0.1)[0]

    return jax.value_and_grad(loss)(params)


@cache
def without_mesh(name: str) -> Any:
    return jax.device_get(loss_and_gradients(*functional.split(make_model(name)), make_batch()))


def on_mesh(model: Transformer, mesh: Mesh, rules: schema.ShardingRules) -> tuple[Any, ...]:
    """Arguments of `loss_and_gradients`, laid out by the rules."""
    graphdef, *arrays = functional.split(model)
    params, buffers = jax.device_put(tuple(arrays), functional.shardings(model, mesh, rules))
    rows = sharding.named_sharding(mesh, ("batch", None), rules)
    return graphdef, params, buffers, jax.device_put(make_batch(), rows)


def assert_same(actual: Any, expected: Any) -> None:
    # Sums over rows and heads are taken in another order: a few roundings of float32.
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(a, np.float64) - b).max()
        assert error <= 2e-6 * np.abs(b).max()


@pytest.mark.parametrize(
    ("name", "mesh_name", "axis_type"),
    [
        ("complex_vq", "data2_fsdp2_tensor2", "explicit"),
        ("rope_full", "fsdp2_tensor2_sequence2", "explicit"),
        # With Auto axes the same constraints are hints.
        ("rope_full", "fsdp2_tensor2_sequence2", "auto"),
        # This one sums over tensor; others run on each device alone, or as the full head does.
        ("rope_tied_streamed", "data2_fsdp2_tensor2", "explicit"),
        *(pytest.param(*case, marks=oldest_jax) for case in FURTHER_CASES),
    ],
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(
    name: str, mesh_name: str, axis_type: str
) -> None:
    mesh = make_mesh(mesh_name, axis_type)
    rules = SEQUENCE_RULES if "sequence" in mesh_name else RULES
    with jax.set_mesh(mesh):
        arguments = on_mesh(make_model(name, rules), mesh, rules)
        loss, gradients = loss_and_gradients(*arguments)
    assert_same((loss, gradients), without_mesh(name))
    if axis_type == "explicit":  # Auto leaves it to the compiler.
        for gradient, param in zip(
            jax.tree.leaves(gradients), jax.tree.leaves(arguments[1]), strict=True
        ):
            assert gradient.sharding.is_equivalent_to(param.sharding, param.ndim)


@oldest_jax
def test_other_rules() -> None:
    """Codes sharded, vocabulary and heads whole, weights over two axes."""
    rules = schema.ShardingRules(
        batch=("fsdp",), embed=("data", "fsdp"), vocab=(), heads=(), codes=("tensor",)
    )
    mesh = make_mesh("data2_fsdp2_tensor2", "explicit")
    with jax.set_mesh(mesh):
        arguments = on_mesh(make_model("complex_vq", rules), mesh, rules)
        assert arguments[1]["head"]["codes"].sharding.shard_shape((8, 16)) == (4, 4)
        actual = loss_and_gradients(*arguments)
    assert_same(actual, without_mesh("complex_vq"))


@pytest.mark.parametrize(
    ("dtype", "remat"), [("float32", "none"), ("bfloat16", "dots"), ("bfloat16", "full")]
)
@pytest.mark.parametrize("name", MODELS)
def test_explicit_types_of_every_model(name: str, dtype: str, remat: str) -> None:
    """On an explicit mesh shardings are types: what cannot be laid out fails when traced."""
    mesh = make_mesh("data2_fsdp2_tensor2", "explicit")
    with jax.set_mesh(mesh):
        graphdef, *arrays = on_mesh(make_model(name, RULES, dtype, remat), mesh, RULES)
        loss, gradients = jax.eval_shape(partial(loss_and_gradients, graphdef), *arrays)
    chex.assert_type([loss, *jax.tree.leaves(gradients)], jnp.float32)


def test_parameters_lie_where_the_rules_say() -> None:
    """Embed 16 over fsdp 2; heads 8, key heads 4, mlp 32 and vocabulary 24 over tensor 2."""
    mesh = make_mesh("data2_fsdp2_tensor2", "explicit")
    expected = {
        "embedding.table": (12, 8),
        "blocks.attention.q": (2, 8, 4, 4),
        "blocks.attention.k": (2, 8, 2, 4),
        "blocks.attention.v": (2, 8, 2, 4),
        "blocks.attention.out": (2, 4, 4, 8),
        "blocks.attention.encoding.delta": (2, 2, 2),
        "blocks.attention.encoding.bias": (2, 4, 2),
        "blocks.attention_norm.scale": (2, 8),
        "blocks.mlp.gate": (2, 8, 16),
        "blocks.mlp.up": (2, 8, 16),
        "blocks.mlp.down": (2, 16, 8),
        "blocks.mlp_norm.scale": (2, 8),
        "final_norm.scale": (8,),
        "head.codes": (8, 8),
        "head.bias": (24,),
    }
    _, params, buffers, batch = on_mesh(make_model("complex_vq"), mesh, RULES)
    actual = {
        ".".join(key.key for key in path): [shard.data.shape for shard in x.addressable_shards]
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    assert actual == {name: [shape] * 8 for name, shape in expected.items()}
    assert buffers["head"]["assignment"].sharding.is_fully_replicated
    assert batch["inputs"].sharding.shard_shape((8, 6)) == (2, 6)
    _, full, _, _ = on_mesh(make_model("rope_full"), mesh, RULES)
    assert full["head"]["weights"].sharding.shard_shape((24, 16)) == (12, 8)
    assert full["head"]["bias"].sharding.shard_shape((24,)) == (12,)


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [
        ("complex_vq", "explicit"),
        ("rope_full", "auto"),
        *(
            pytest.param(name, "explicit", marks=oldest_jax)
            for name in ("rope_full", "rope_tied_streamed", "rope_huffman")
        ),
    ],
)
def test_generation_does_not_depend_on_the_mesh(name: str, axis_type: str) -> None:
    prompt, rules = np.asarray([3, 1, 4, 1, 5]), dataclasses.replace(RULES, batch=())
    expected = greedy_without_mesh(name)
    assert len(set(expected)) > 1
    mesh = make_mesh("data2_fsdp2_tensor2", axis_type)
    with jax.set_mesh(mesh):
        _, params, buffers, _ = on_mesh(make_model(name), mesh, RULES)
        graphdef = functional.split(make_model(name, rules))[0]
        actual = generate(graphdef, params, buffers, prompt, 6, seed=0, temperature=0.0)
    np.testing.assert_array_equal(actual, expected)


@cache
def greedy_without_mesh(name: str) -> np.ndarray:
    parts = functional.split(make_model(name))
    return generate(*parts, np.asarray([3, 1, 4, 1, 5]), 6, seed=0, temperature=0.0)


@oldest_jax
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("name", ["complex_vq", "rope_full"])
def test_logits_of_a_sharded_batch(name: str, axis_type: str) -> None:
    def logits(model: Transformer, inputs: jax.Array) -> jax.Array:
        return model.head.logits(model.embedding(inputs))

    mesh = make_mesh("data2_fsdp2_tensor2", axis_type)
    with jax.set_mesh(mesh):
        graphdef, params, buffers, batch = on_mesh(make_model(name), mesh, RULES)
        actual = jax.jit(logits)(nnx.merge(graphdef, params, buffers), batch["inputs"])
    assert actual.sharding.shard_shape(actual.shape)[0] == 2
    expected = jax.jit(logits)(make_model(name), make_batch()["inputs"])
    assert_same(actual, expected)


@oldest_jax
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("name", ["complex_vq", "rope_full", "rope_huffman"])
def test_log_probs_of_a_sharded_sequence(name: str, axis_type: str) -> None:
    def log_probs(model: Transformer, inputs: jax.Array, tokens: jax.Array) -> jax.Array:
        return model.head.log_probs(model.embedding(inputs), tokens)

    tokens = np.arange(8 * 6 * 3).reshape(8, 6, 3) * 7 % 24
    mesh, rules = make_mesh("fsdp2_tensor2_sequence2", axis_type), SEQUENCE_RULES
    with jax.set_mesh(mesh):
        graphdef, params, buffers, batch = on_mesh(make_model(name, rules), mesh, rules)
        cut = jax.device_put(tokens, sharding.named_sharding(mesh, ("batch", "sequence"), rules))
        actual = jax.jit(log_probs)(nnx.merge(graphdef, params, buffers), batch["inputs"], cut)
    expected = jax.jit(log_probs)(make_model(name), make_batch()["inputs"], tokens)
    assert_same(actual, expected)


def test_make_mesh() -> None:
    mesh = sharding.make_mesh({"tensor": 1, "data": 2, "fsdp": 4})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
    assert mesh.axis_names == sharding.MESH_AXES
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert set(make_mesh("tensor4", "auto").axis_types) == {AxisType.Auto}
    assert make_mesh("tensor4", "auto").size == 4


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        ((), PartitionSpec()),
        ((None,), PartitionSpec(None)),
        (("embed",), PartitionSpec("fsdp")),
        (("codes",), PartitionSpec(None)),
        (("batch", None, "heads"), PartitionSpec(("data", "fsdp"), None, "tensor")),
    ],
)
def test_partition_spec(axes: sharding.LogicalAxes, spec: PartitionSpec) -> None:
    assert sharding.partition_spec(axes, RULES) == spec


def test_unknown_logical_axis() -> None:
    with pytest.raises(AttributeError, match="hidden"):
        sharding.partition_spec(("hidden",), RULES)


def test_helpers_without_a_mesh() -> None:
    x, w = jnp.arange(6.0).reshape(2, 3), jnp.arange(3.0)[:, None]
    assert sharding.constrain(x, ("batch", None), RULES) is x
    assert sharding.per_device(jnp.sin, [()], [()], RULES) is jnp.sin
    np.testing.assert_array_equal(sharding.einsum("ij,jk->ik", x, w, ("batch", None), RULES), x @ w)
    rows = sharding.take_rows(x, jnp.asarray([1, 1, 0]), ("batch", None), RULES)
    np.testing.assert_array_equal(rows, x[jnp.asarray([1, 1, 0])])


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_helpers_on_a_mesh(axis_type: str) -> None:
    mesh = make_mesh("data2_fsdp2_tensor2", axis_type)
    table, index = jnp.arange(64.0).reshape(16, 4), jnp.arange(8) * 2 % 16
    w = jnp.arange(8.0).reshape(4, 2)
    seen = []

    def double(block: jax.Array) -> tuple[jax.Array]:
        seen.append(block.shape)
        return (2 * block,)

    @jax.jit
    def run(table: jax.Array, index: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        rows = sharding.take_rows(table, index, ("batch", None), RULES)
        spread = sharding.constrain(rows, (None, "mlp"), RULES)
        product = sharding.einsum("ij,jk->ik", spread, w, ("batch", None), RULES)
        return product, *sharding.per_device(double, [("batch", None)], [("batch", None)], RULES)(
            rows
        )

    with jax.set_mesh(mesh):
        arguments = [
            jax.device_put(x, sharding.named_sharding(mesh, axes, RULES))
            for x, axes in ((table, ("vocab", None)), (index, ("batch",)), (w, ("mlp", None)))
        ]
        product, doubled = run(*arguments)
    np.testing.assert_array_equal(product, table[index] @ w)
    np.testing.assert_array_equal(doubled, 2 * table[index])
    assert seen == [(2, 4)]
    rows = sharding.named_sharding(mesh, ("batch", None), RULES)
    assert product.sharding.is_equivalent_to(rows, 2)
    assert doubled.sharding.is_equivalent_to(rows, 2)
