"""The model: trunk, attention and output layer."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vqcx_jax.config.schema.attention import AttentionConfig, PopeAttention
from vqcx_jax.config.schema.heads import HeadConfig, VQHead
from vqcx_jax.config.schema.types import STRICT, Positive, PositiveFloat


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """A decoder-only transformer: pre-norm RMSNorm, SwiGLU, grouped-query attention."""

    # None: taken from the tokenizer (the resolved value is stored in the checkpoint).
    vocab_size: Positive | None = None
    embed_dim: Positive = 256
    num_layers: Positive = 4
    num_heads: Positive = 4
    num_kv_heads: Positive = 4
    head_dim: Positive = 64
    mlp_dim: Positive = 704
    norm_epsilon: PositiveFloat = 1e-6
    attention: AttentionConfig = Field(default_factory=PopeAttention, discriminator="kind")
    head: HeadConfig = Field(default_factory=VQHead, discriminator="kind")
    # Parameters are always float32; this is the type of activations and matrix products.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # What the backward pass recomputes: nothing, all but matrix products, or the whole layer.
    remat: Literal["none", "dots", "full"] = "none"

    def known_vocab_size(self) -> int:
        """`vocab_size` of a resolved config; ValueError before it is resolved."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size=None: must be set before the model is built")
        return self.vocab_size
