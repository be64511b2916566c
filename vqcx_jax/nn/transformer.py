"""ComplexFormer: a decoder-only, pre-norm transformer with exchangeable attention and head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config import schema
from vqcx_jax.maps import TokenMap
from vqcx_jax.nn.attention import Attention, KVCache, TokenInfo
from vqcx_jax.nn.heads import ClassVQHead, FullHead, Head, MultiVQHead, make_head
from vqcx_jax.nn.layers import HIDDEN, MLP, ROWS, Embedding, RMSNorm
from vqcx_jax.sharding import constrain

_REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: schema.Model, *, rules: schema.ShardingRules, rngs: nnx.Rngs):
        dim, dtype = config.embed_dim, jnp.dtype(config.dtype)
        self.attention_norm = RMSNorm(dim, epsilon=config.norm_epsilon, rules=rules)
        self.attention = Attention(
            dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            attention=config.attention,
            num_layers=config.num_layers,
            dtype=dtype,
            rules=rules,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(dim, epsilon=config.norm_epsilon, rules=rules)
        self.mlp = MLP(
            dim, config.mlp_dim, num_layers=config.num_layers, dtype=dtype, rules=rules, rngs=rngs
        )
        self.rules = rules

    def __call__(
        self,
        x_BxTxD: jax.Array,
        info: TokenInfo,
        cache: KVCache | None = None,
        cache_length: jax.Array | int = 0,
        layer: jax.Array | int | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """See `Attention.__call__`."""
        y_BxTxD, cache = self.attention(
            self.attention_norm(x_BxTxD), info, cache, cache_length, layer
        )
        x_BxTxD = x_BxTxD + y_BxTxD
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD)), cache


class Transformer(nnx.Module):
    """Token ids to hidden states (`hidden`), and a head that turns those into losses or logits.

    Args:
        config: shapes; `vocab_size` must be set.
        token_map: for a head of codes, see `make_head`.
        rules: how logical axes are sharded when a mesh is set.
        rngs: a `params` stream.
    """

    def __init__(
        self,
        config: schema.Model,
        *,
        token_map: TokenMap | None = None,
        rules: schema.ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        rules = rules or schema.ShardingRules()
        # With a tied head, its weights are the embedding's table. They are at one place only: a
        # module is a pytree, and what stands at two places of one is two arrays after jax.jit.
        can_tie = schema.FullHead | schema.VQHead | schema.ClassVQHead
        tied = isinstance(config.head, can_tie) and config.head.tied
        self.embedding = None if tied else _embedding(config, rules, rngs)
        # One Block whose arrays have a leading layer axis: the layers are scanned, so that
        # compile time does not grow with depth.
        self.blocks = jax.vmap(lambda key: Block(config, rules=rules, rngs=nnx.Rngs(params=key)))(
            jax.random.split(rngs.params(), config.num_layers)
        )
        self.final_norm = RMSNorm(config.embed_dim, epsilon=config.norm_epsilon, rules=rules)
        self.head: Head = make_head(config, token_map, rules=rules, rngs=rngs)
        self.config = config
        self.rules = rules

    def hidden(
        self,
        tokens_BxT: jax.Array,
        segment_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states, for `self.head`.

        Args:
            tokens_BxT: int, values in [0, V).
            segment_ids_BxT: int, which packed document a token belongs to; None: one a row.
            positions_BxT: int, position within the document; None: 0 .. T-1.

        Returns:
            (B, T, D) in the compute dtype.
        """
        if segment_ids_BxT is None:
            segment_ids_BxT = jnp.zeros_like(tokens_BxT)
        if positions_BxT is None:
            positions_BxT = jnp.zeros_like(tokens_BxT) + jnp.arange(tokens_BxT.shape[1])
        tokens_BxT, segment_ids_BxT, positions_BxT = (
            constrain(x, ROWS, self.rules) for x in (tokens_BxT, segment_ids_BxT, positions_BxT)
        )
        info = self.blocks.attention.encoding.info(segment_ids_BxT, positions_BxT)

        def layer(x_BxTxD: jax.Array, block: Block) -> tuple[jax.Array, None]:
            x_BxTxD, _ = block(x_BxTxD, info)
            return constrain(x_BxTxD, HIDDEN, self.rules), None

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[self.config.remat])
        x_BxTxD, _ = jax.lax.scan(layer, self.embed(tokens_BxT), self.blocks)
        return self.final_norm(x_BxTxD)

    def empty_cache(self, batch_size: int, max_length: int) -> KVCache:
        """A KV cache for `extend`: all layers stacked, room for max_length positions.

        As many as that is rounded up to a multiple of 8: others are read from a copy on TPUs.
        Where `cache_length` is traced nothing is said when it runs over: positions past them
        overwrite the last ones.
        """
        config = self.config
        shape = (config.num_layers, batch_size, -(-max_length // 8) * 8, config.num_kv_heads)

        def zeros(width: int) -> jax.Array:
            x = jnp.zeros((*shape, width), jnp.dtype(config.dtype))
            return constrain(x, (None, "batch", None, "heads", None), self.rules)

        return KVCache(zeros(self.blocks.attention.encoding.key_width), zeros(config.head_dim))

    def extend(
        self, tokens_BxT: jax.Array, cache: KVCache, cache_length: jax.Array | int
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states of T more tokens of B sequences whose first cache_length are cached.

        Equal to the last T columns of `hidden` over the whole sequences. Used for prefill (T =
        prompt length, an empty cache) and for decoding (T = 1).

        Returns:
            (B, T, D) and the cache with the T tokens added.
        """
        positions = jnp.zeros_like(tokens_BxT) + cache_length + jnp.arange(tokens_BxT.shape[1])
        info = self.blocks.attention.encoding.info(None, positions)

        # The cache is carried whole, and each layer writes its tokens into it: as slices that the
        # scan takes and puts back, all of it would be copied for each token.
        def layer(
            x_and_cache: tuple[jax.Array, KVCache], block_and_index: tuple[Block, jax.Array]
        ) -> tuple[tuple[jax.Array, KVCache], None]:
            (x_BxTxD, cache), (block, index) = x_and_cache, block_and_index
            return block(x_BxTxD, info, cache, cache_length, index), None

        layers = (self.blocks, jnp.arange(self.config.num_layers))
        (x_BxTxD, cache), _ = jax.lax.scan(layer, (self.embed(tokens_BxT), cache), layers)
        return self.final_norm(x_BxTxD), cache

    def embed(self, tokens_BxT: jax.Array) -> jax.Array:
        """What the first layer is given, (B, T, D)."""
        if self.embedding is not None:
            return self.embedding(tokens_BxT)
        assert isinstance(self.head, FullHead | MultiVQHead | ClassVQHead)
        return self.head.embed(tokens_BxT)


def _embedding(config: schema.Model, rules: schema.ShardingRules, rngs: nnx.Rngs) -> Embedding:
    return Embedding(
        config.known_vocab_size(),
        config.embed_dim,
        dtype=jnp.dtype(config.dtype),
        rules=rules,
        rngs=rngs,
    )
