"""From a config to an output layer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqcx_jax.config import schema
from vqcx_jax.errors import DataError
from vqcx_jax.maps import TokenClasses, TokenMap
from vqcx_jax.maps.fixed import contiguous_map
from vqcx_jax.maps.make import check_classes, check_sizes
from vqcx_jax.nn.heads.adaptive import AdaptiveHead
from vqcx_jax.nn.heads.base import Head
from vqcx_jax.nn.heads.class_vq import ClassVQHead
from vqcx_jax.nn.heads.frequency_order import paths_of, ranks_of
from vqcx_jax.nn.heads.full import FullHead
from vqcx_jax.nn.heads.huffman import HuffmanHead
from vqcx_jax.nn.heads.learned_vq import LearnedVQHead
from vqcx_jax.nn.heads.low_rank import LowRankHead
from vqcx_jax.nn.heads.multi_vq import MultiVQHead
from vqcx_jax.nn.heads.reassigned_vq import ReassignedVQHead
from vqcx_jax.nn.heads.two_level import TwoLevelHead
from vqcx_jax.nn.heads.vq import VQHead
from vqcx_jax.ops.codebook import classes
from vqcx_jax.ops.hierarchical import huffman_paths


def make_head(
    config: schema.Model,
    token_map: TokenMap | None,
    *,
    rules: schema.ShardingRules,
    rngs: nnx.Rngs,
) -> Head:
    """The output layer `config.head`.

    Args:
        token_map: for heads of codes; for heads that order tokens, see `order_by_frequency`.
            None: a placeholder, for heads whose arrays come from a checkpoint.

    Raises:
        DataError: the map is not of this vocabulary, or does not fit the head.
    """
    if token_map is not None:
        _check_map(config, token_map)
    head = _make(config, token_map, rules, rngs)
    if token_map is not None and token_map.bias is not None:
        _start_biases(head, token_map.bias)
    return head


def _make(
    config: schema.Model,
    token_map: TokenMap | None,
    rules: schema.ShardingRules,
    rngs: nnx.Rngs,
) -> Head:
    match config.head:
        case schema.FullHead():
            return _full(config, config.head, token_map, rules, rngs)
        case schema.LowRankHead():
            return _low_rank(config, config.head, rules, rngs)
        case schema.AdaptiveHead():
            return _adaptive(config, config.head, token_map, rules, rngs)
        case schema.HierarchicalHead():
            return _hierarchical(config, config.head, token_map, rules, rngs)
        case schema.ClassVQHead():
            return _class_vq(config, config.head, token_map, rules, rngs)
        case schema.VQHead():
            return _vq(config, config.head, token_map, rules, rngs)


def _check_map(config: schema.Model, token_map: TokenMap) -> None:
    vocab_size = config.known_vocab_size()
    if token_map.vocab_size != vocab_size:
        raise DataError(
            f"token_map: is for {token_map.vocab_size} tokens, must be for model.vocab_size="
            f"{vocab_size}"
        )
    match config.head:
        case schema.VQHead():
            check_sizes(config.head, token_map, "token_map")
        case schema.ClassVQHead():
            check_sizes(config.head.codes(), token_map, "token_map")
            check_classes(config.head, token_map, "token_map")


def _start_biases(head: Head, bias: np.ndarray) -> None:
    """Sets token biases to `bias`, those of classes to the logarithm of their tokens' sum."""
    kinds = VQHead | MultiVQHead | ClassVQHead | FullHead | LowRankHead
    if not isinstance(head, kinds) or not head.has_bias:
        raise DataError("token_map: has biases to start from, which this head has not")
    start = jnp.asarray(bias)
    if isinstance(head, ClassVQHead):
        members = head.members[...]
        of_members = jnp.where(members < 0, -jnp.inf, start[members])
        start = jnp.append(start, jax.nn.logsumexp(of_members, axis=-1))
    head.bias.set_value(start)


def _full(
    config: schema.Model,
    head: schema.FullHead,
    token_map: TokenMap | None,
    rules: schema.ShardingRules,
    rngs: nnx.Rngs,
) -> Head:
    return FullHead(
        config.known_vocab_size(),
        config.embed_dim,
        token_bias=head.token_bias,
        logit_soft_cap=head.logit_soft_cap,
        implementation=head.implementation,
        weights=None if token_map is None else _array(token_map.own_vectors),
        dtype=jnp.dtype(config.dtype),
        rules=rules,
        rngs=rngs,
    )


def _low_rank(
    config: schema.Model, head: schema.LowRankHead, rules: schema.ShardingRules, rngs: nnx.Rngs
) -> Head:
    return LowRankHead(
        config.known_vocab_size(),
        config.embed_dim,
        head.rank,
        token_bias=head.token_bias,
        logit_soft_cap=head.logit_soft_cap,
        dtype=jnp.dtype(config.dtype),
        rules=rules,
        rngs=rngs,
    )


def _adaptive(
    config: schema.Model,
    head: schema.AdaptiveHead,
    token_map: TokenMap | None,
    rules: schema.ShardingRules,
    rngs: nnx.Rngs,
) -> Head:
    return AdaptiveHead(
        config.known_vocab_size(),
        config.embed_dim,
        head.cutoffs,
        div_value=head.div_value,
        head_bias=head.head_bias,
        frequency_rank=ranks_of(token_map),
        dtype=jnp.dtype(config.dtype),
        rules=rules,
        rngs=rngs,
    )


def _hierarchical(
    config: schema.Model,
    head: schema.HierarchicalHead,
    token_map: TokenMap | None,
    rules: schema.ShardingRules,
    rngs: nnx.Rngs,
) -> Head:
    vocab_size, dim = config.known_vocab_size(), config.embed_dim
    options: dict[str, Any] = {"bias": head.bias, "rules": rules, "rngs": rngs}
    if head.tree == "two_level":
        return TwoLevelHead(vocab_size, dim, frequency_rank=ranks_of(token_map), **options)
    paths = huffman_paths(np.ones(vocab_size)) if token_map is None else paths_of(token_map)
    return HuffmanHead(jnp.asarray(paths), dim, **options)


def _vq(
    config: schema.Model,
    head: schema.VQHead,
    token_map: TokenMap | None,
    rules: schema.ShardingRules,
    rngs: nnx.Rngs,
) -> Head:
    if token_map is None:
        token_map = _placeholder(config.known_vocab_size(), head)
    codebooks = token_map.codebooks
    options: dict[str, Any] = {
        "token_bias": head.token_bias,
        "implementation": head.implementation,
        "dtype": jnp.dtype(config.dtype),
        "rules": rules,
        "rngs": rngs,
    }
    learned = head.learned_candidates is not None or head.reassign_every is not None
    if head.num_codebooks == 1 and not (head.num_own_tokens or head.token_scale or learned):
        return VQHead(
            jnp.asarray(token_map.codes[:, 0]),
            head.num_codes,
            config.embed_dim,
            logit_soft_cap=head.logit_soft_cap,
            codes=None if codebooks is None else jnp.asarray(codebooks[0]),
            **options,
        )
    options |= {
        "form": head.form,
        "own_tokens": jnp.asarray(token_map.own_tokens) if head.num_own_tokens else None,
        "token_scale": head.token_scale,
        "codebooks": None if codebooks is None else jnp.stack(codebooks),
        "scale": _array(token_map.scale),
        "own_vectors": _array(token_map.own_vectors),
    }
    shape = (jnp.asarray(token_map.codes), head.num_codes, config.embed_dim)
    if head.learned_candidates is not None:
        options |= {"num_candidates": head.learned_candidates, "gumbel": head.gumbel}
        return LearnedVQHead(*shape, **options)
    options |= {"expand_vectors": head.expand_vectors, "logit_soft_cap": head.logit_soft_cap}
    if head.reassign_every is not None:
        options |= {"every": head.reassign_every, "decay": head.reassign_decay}
        return ReassignedVQHead(*shape, **options)
    return MultiVQHead(*shape, **options)


def _class_vq(
    config: schema.Model,
    head: schema.ClassVQHead,
    token_map: TokenMap | None,
    rules: schema.ShardingRules,
    rngs: nnx.Rngs,
) -> Head:
    vocab_size = config.known_vocab_size()
    num_classes, num_frequent, num_ranks = head.sizes(vocab_size)
    if token_map is None:
        rest = contiguous_map(vocab_size - num_frequent, num_classes)[:, 0]
        class_of = np.append(np.full(num_frequent, -1), rest).astype(np.int32)
        class_codes = np.zeros((num_classes, head.num_codebooks), np.int32)
        token_map = dataclasses.replace(
            _placeholder(vocab_size, head.codes()), classes=TokenClasses(class_of, class_codes)
        )
    of_classes, codebooks, scale = token_map.classes, token_map.codebooks, token_map.scale
    assert of_classes is not None
    if scale is not None:
        assert of_classes.scale is not None
        scale = np.append(scale, of_classes.scale)
    return ClassVQHead(
        classes.arrange(of_classes.of_token, num_classes, num_ranks),
        jnp.asarray(np.append(token_map.codes, of_classes.codes, axis=0)),
        head.num_codes,
        config.embed_dim,
        token_bias=head.token_bias,
        token_scale=head.token_scale,
        implementation=head.implementation,
        codebooks=None if codebooks is None else jnp.stack(codebooks),
        scale=_array(scale),
        dtype=jnp.dtype(config.dtype),
        rules=rules,
        rngs=rngs,
    )


def _placeholder(vocab_size: int, head: schema.VQHead) -> TokenMap:
    """A map of the right shapes."""
    codes = np.zeros((vocab_size, head.num_codebooks), np.int32)
    own_tokens = np.arange(head.num_own_tokens, dtype=np.int32)
    return TokenMap(codes, (head.num_codes,) * head.num_codebooks, own_tokens=own_tokens)


def _array(x: np.ndarray | None) -> jax.Array | None:
    return None if x is None else jnp.asarray(x)
