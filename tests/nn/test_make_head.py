"""Every head of codes that a config can ask for: built from a map, and from none for a restore."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from versions import oldest_jax

from vqcx_jax.config import schema
from vqcx_jax.errors import DataError, UserError
from vqcx_jax.maps import TokenMap, log_shares, make_map, own_map
from vqcx_jax.nn import functional, heads
from vqcx_jax.nn.build import abstract_model, build_model

V, D = 29, 16
PRODUCT: dict[str, Any] = {"form": "product", "num_codebooks": 4, "assignment": "random"}
CLASSES: dict[str, Any] = {
    "num_codes": 5,
    "num_codebooks": 4,
    "assignment": "random",
    "code_init": "random",
}
CASES: dict[str, tuple[schema.HeadConfig, type]] = {
    "one codebook": (schema.VQHead(num_codes=5), heads.VQHead),
    "own vectors": (schema.VQHead(num_codes=5, num_own_tokens=3), heads.MultiVQHead),
    "two codebooks": (
        schema.VQHead(num_codes=5, num_codebooks=2, assignment="random"),
        heads.MultiVQHead,
    ),
    "product, all options": (
        schema.VQHead(num_codes=5, num_own_tokens=3, token_scale=True, tied=True, **PRODUCT),
        heads.MultiVQHead,
    ),
    "product, streamed codes": (
        schema.VQHead(num_codes=5, expand_vectors=False, **PRODUCT),
        heads.MultiVQHead,
    ),
    "learned": (
        schema.VQHead(num_codes=5, learned_candidates=3, token_scale=True, **PRODUCT),
        heads.LearnedVQHead,
    ),
    "reassigned": (schema.VQHead(num_codes=5, reassign_every=9), heads.ReassignedVQHead),
    # 10 classes of the 19 tokens that are not frequent: one has a token less than the others.
    "classes": (schema.ClassVQHead(**CLASSES), heads.ClassVQHead),
    # 3 classes of 29 tokens, of 9 or 10.
    "classes, all tokens, tied": (
        schema.ClassVQHead(**CLASSES, num_classes=3, num_frequent=0, token_scale=False, tied=True),
        heads.ClassVQHead,
    ),
    "classes, one codebook": (
        schema.ClassVQHead(**{**CLASSES, "num_codebooks": 1}, token_bias=False),
        heads.ClassVQHead,
    ),
}


def near_map_of(head: schema.VQHead | schema.ClassVQHead) -> tuple[TokenMap, np.ndarray]:
    """From near vectors, with what its head starts from, and the counts of its text."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(V, size=200) for _ in range(5)]
    counts = np.bincount(np.concatenate(documents), minlength=V)
    head = dataclasses.replace(head, assignment="cooccurrence", code_init="centroids")
    sizes: Any = {"vocab_size": V, "embed_dim": D, "seed": 0, "documents": lambda: documents}
    return make_map(head, counts=counts, **sizes), counts


@pytest.mark.parametrize(
    "name",
    [
        "one codebook",
        "own vectors",
        "two codebooks",
        "product, all options",
        "classes",
        "classes, all tokens, tied",
    ],
)
@pytest.mark.parametrize("with_counts", [False, True])
def test_head_from_a_map(name: str, with_counts: bool) -> None:
    """The same as from a config."""
    config, kind = CASES[name]
    assert isinstance(config, schema.VQHead | schema.ClassVQHead)
    token_map, counts = near_map_of(config)
    options: dict[str, Any] = {"counts": counts} if with_counts else {}
    if isinstance(config, schema.VQHead):
        options["form"] = config.form
    head = heads.head_from_map(token_map, D, rngs=nnx.Rngs(0), **options)
    assert type(head) is kind
    bias = log_shares(counts) if with_counts else None
    with_biases = dataclasses.replace(token_map, bias=bias)
    model = schema.Model(vocab_size=V, embed_dim=D, head=config)
    rules = schema.ShardingRules()
    expected = heads.make_head(model, with_biases, rules=rules, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(x)) for x in (head, expected)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": np.ones(V + 1)}, r"counts of shape \(30,\): must be \(29,\), with token_bias"),
        ({"counts": np.ones(V), "token_bias": False}, "counts of shape"),
        ({"form": "additive"}, "form='additive': must be 'product' for a map with classes"),
        ({"implementation": "cuda"}, "implementation='cuda': must be one of"),
        ({"dtype": "int8"}, "dtype='int8': must be 'float32' or 'bfloat16'"),
        ({"dim": 0}, "dim=0: must be at least 1"),
        ({"dim": 15}, "codebooks|dim=15"),
    ],
)
def test_head_from_a_map_that_does_not_fit(options: dict[str, Any], message: str) -> None:
    config = CASES["classes"][0]
    assert isinstance(config, schema.ClassVQHead)
    options = {"dim": D, **options}
    with pytest.raises(UserError, match=message):
        heads.head_from_map(near_map_of(config)[0], **options, rngs=nnx.Rngs(0))


def make_config(head: schema.HeadConfig) -> schema.Config:
    sizes = dict(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=24)
    return schema.Config(model=schema.Model(vocab_size=V, embed_dim=D, head=head, **sizes))


def map_of(head: Any) -> TokenMap:
    counts = np.arange(V)[::-1].copy()
    return make_map(head, vocab_size=V, embed_dim=D, counts=counts, seed=0)


@oldest_jax
@pytest.mark.parametrize("name", CASES)
def test_built_from_a_map_and_without_one(name: str) -> None:
    config, kind = make_config(CASES[name][0]), CASES[name][1]
    token_map = map_of(config.model.head)
    model = jax.jit(lambda key: build_model(config, token_map, key))(jax.random.key(0))
    assert type(model.head) is kind
    abstract = abstract_model(config)
    assert functional.split(abstract)[0] == functional.split(model)[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(
        functional.split(abstract)[1:], functional.split(model)[1:]
    )
    tokens = jnp.arange(20).reshape(2, 10)
    nll, _ = model.head.nll(model.hidden(tokens), tokens)
    # Small random vectors: every token has about the same probability.
    np.testing.assert_allclose(nll, np.log(V), atol=0.5)
    assert (model.embedding is None) == getattr(config.model.head, "tied", False)


@pytest.mark.parametrize(
    "name", [name for name, (head, _) in CASES.items() if isinstance(head, schema.VQHead)]
)
def test_the_map_is_taken(name: str) -> None:
    head: Any = CASES[name][0]
    token_map = map_of(head)
    rng = np.random.default_rng(0)
    width = D // head.num_codebooks if head.form == "product" else D
    start = {
        "codebooks": tuple(
            rng.standard_normal((5, width), np.float32) for _ in range(head.num_codebooks)
        ),
        "scale": rng.random(V, np.float32) if head.token_scale else None,
        "own_vectors": rng.random((3, D), np.float32) if head.num_own_tokens else None,
    }
    token_map = dataclasses.replace(token_map, **start)
    model: Any = build_model(make_config(head), token_map, jax.random.key(0))
    made = model.head
    codes = made.assignment[...]
    np.testing.assert_array_equal(codes.reshape(V, -1), token_map.codes)
    if isinstance(made, heads.VQHead):
        np.testing.assert_array_equal(made.codes[...], start["codebooks"][0])
        return
    np.testing.assert_array_equal(made.codebooks[...], np.stack(start["codebooks"]))
    if head.token_scale:
        np.testing.assert_array_equal(made.scale[...], start["scale"])
    if head.num_own_tokens:
        np.testing.assert_array_equal(made.own_tokens[...], [0, 1, 2])
        np.testing.assert_array_equal(made.own_vectors[...], start["own_vectors"])


def test_the_classes_are_taken() -> None:
    """Rows of codes and scales are those of the tokens, then those of the classes."""
    head: Any = CASES["classes"][0]
    token_map = map_of(head)
    rng = np.random.default_rng(0)
    codebooks = tuple(rng.standard_normal((5, D // 4), np.float32) for _ in range(4))
    assert token_map.classes is not None
    classes = dataclasses.replace(token_map.classes, scale=rng.random(10, np.float32))
    token_map = dataclasses.replace(
        token_map, codebooks=codebooks, scale=rng.random(V, np.float32), classes=classes
    )
    model: Any = build_model(make_config(head), token_map, jax.random.key(0))
    made = model.head
    np.testing.assert_array_equal(made.codebooks[...], np.stack(codebooks))
    np.testing.assert_array_equal(made.assignment[:V], token_map.codes)
    np.testing.assert_array_equal(made.assignment[V:], classes.codes)
    np.testing.assert_array_equal(made.scale[:V], token_map.scale)
    np.testing.assert_array_equal(made.scale[V:], classes.scale)
    # The most frequent tokens have the lowest ids, and every class its tokens.
    np.testing.assert_array_equal(made.entries[...], [*range(10), *range(V, V + 10)])
    assert made.members.shape == (10, 2)
    for class_, members in enumerate(made.members[...]):
        expected = np.flatnonzero(classes.of_token == class_)
        np.testing.assert_array_equal(members[members >= 0], expected)


def test_a_map_without_classes_is_refused() -> None:
    config = make_config(CASES["classes"][0])
    token_map = dataclasses.replace(map_of(config.model.head), classes=None)
    with pytest.raises(DataError, match="^model.head.num_classes=10: token_map has no classes$"):
        build_model(config, token_map, jax.random.key(0))


@pytest.mark.parametrize(
    ("head", "token_map", "message"),
    [
        (
            schema.FullHead(),
            own_map(15),
            f"token_map: is for 15 tokens, must be for model.vocab_size={V}",
        ),
        (
            schema.VQHead(num_codes=5),
            map_of(schema.VQHead(num_codes=3)),
            "model.head.num_codes=5: token_map has 3",
        ),
        (
            schema.VQHead(num_codes=5),
            map_of(schema.VQHead(num_codes=5, num_codebooks=2, assignment="random")),
            "model.head.num_codebooks=1: token_map has 2",
        ),
        (
            schema.VQHead(num_codes=5),
            map_of(schema.VQHead(num_codes=5, num_own_tokens=2)),
            "model.head.num_own_tokens=0: token_map has 2",
        ),
        (
            schema.FullHead(token_bias=False),
            dataclasses.replace(own_map(V), bias=np.zeros(V, np.float32)),
            "token_map: has biases to start from, which this head has not",
        ),
    ],
)
def test_a_map_that_does_not_fit_is_refused(head: Any, token_map: TokenMap, message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}$"):
        build_model(make_config(head), token_map, jax.random.key(0))


BIASED = {
    "full": schema.FullHead(token_bias=True, bias_init="counts"),
    "low rank": schema.LowRankHead(rank=4, token_bias=True, bias_init="counts"),
    "one codebook": schema.VQHead(num_codes=5, bias_init="counts"),
    "several": schema.VQHead(num_codes=5, bias_init="counts", num_own_tokens=3, **PRODUCT),
    "classes": schema.ClassVQHead(**CLASSES),
}


@pytest.mark.parametrize("name", BIASED)
def test_biases_of_counts_start_at_the_unigram_distribution(name: str) -> None:
    head: Any = BIASED[name]
    counts = np.arange(V)[::-1] ** 2  # The last token is unseen.
    is_mapped = isinstance(head, schema.VQHead | schema.ClassVQHead)
    token_map = map_of(head) if is_mapped else own_map(V)
    token_map = dataclasses.replace(token_map, bias=log_shares(counts))
    model = build_model(make_config(head), token_map, jax.random.key(0))
    p = jax.nn.softmax(model.head.logits(jnp.zeros((1, 1, D))))[0, 0]
    seen = np.maximum(counts, 1)
    np.testing.assert_allclose(p, seen / seen.sum(), rtol=1e-5)
