"""Output layers."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vqcx_jax.config.schema.types import (
    STRICT,
    BiasInit,
    HeadImplementation,
    NonNegative,
    OpenFraction,
    Positive,
    PositiveFloat,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VQHead:
    """VQ-Logits: a token has M codes, one a codebook, and its logit is the sum of theirs."""

    kind: Literal["vq"] = "vq"
    # Code vectors of each codebook.
    num_codes: Positive = 512
    num_codebooks: Positive = 1
    # "additive": code vectors are as wide as the hidden state; "product": codebook m sees the m-th
    # of num_codebooks equal slices of it.
    form: Literal["additive", "product"] = "additive"
    # Which codes a token has. "file": those of `token_map`; the others are made before training,
    # "cooccurrence" from vectors of co-occurrence counts (see `python -m vqcx_jax.maps`).
    assignment: Literal["random", "contiguous", "frequency", "cooccurrence", "file"] = "frequency"
    # For assignment="file": a token map, as `python -m vqcx_jax.maps` writes it.
    token_map: str | None = None
    # "centroids" starts code vectors, token scales and own vectors from the vectors that the map
    # was made of. For assignment="cooccurrence" and "file".
    code_init: Literal["random", "centroids"] = "random"
    # So many tokens have a vector of their own instead of codes: the most frequent ones, or those
    # of `token_map`.
    num_own_tokens: NonNegative = 0
    # A trained factor per token on the part of its logit that depends on the hidden state.
    token_scale: bool = False
    # How the loss is computed with more than two codebooks or with scales, see `MultiVQHead`:
    # from token vectors that are built in every step (True), or from codes (False).
    # None: as suits the device.
    expand_vectors: bool | None = None
    # Learn the map: every token chooses, in each codebook, among so many codes nearest to the one
    # that it starts with. None: codes stay what they are.
    learned_candidates: Annotated[int, Field(ge=2)] | None = None
    # Codes that are learned are drawn while training (straight-through Gumbel-softmax).
    gumbel: bool = True
    # Change the map in every so many steps: each token goes to the code whose tokens have hidden
    # states like its own, as targets (see `ReassignedVQHead`). None: codes stay what they are.
    reassign_every: Positive | None = None
    # Per step, of the running sums of hidden states.
    reassign_decay: OpenFraction = 0.99
    # The input embedding is made of the same codes and vectors, trained by both uses. Needs more
    # than one codebook: the input must tell tokens apart.
    tied: bool = False
    token_bias: bool = True
    # Token biases start at 0, or at the logarithms of the tokens' shares of the training text.
    bias_init: BiasInit = "zeros"
    # Code logits go through cap * tanh(l / cap), before the token's bias. None: as they are.
    logit_soft_cap: PositiveFloat | None = None
    # "auto": by kernels, on devices that have them for what is asked; "xla": in plain JAX alone.
    implementation: HeadImplementation = "auto"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClassVQHead:
    """Product codes in classes: frequent tokens beside classes of the others, tokens in a class."""

    kind: Literal["class_vq"] = "class_vq"
    # Of each codebook, and how many; num_codebooks must divide embed_dim.
    num_codes: Positive = 64
    num_codebooks: Positive = 64
    # Classes at the first level. None: 4 sqrt(V), or V / 3 in a small vocabulary.
    num_classes: Positive | None = None
    # So many of the most frequent tokens stand at the first level. None: as many.
    num_frequent: NonNegative | None = None
    # Codes and classes, as in VQHead: "random", or from near vectors.
    assignment: Literal["random", "cooccurrence", "file"] = "cooccurrence"
    token_map: str | None = None
    code_init: Literal["random", "centroids"] = "centroids"
    token_scale: bool = True
    # As in VQHead.
    tied: bool = False
    token_bias: bool = True
    # As in VQHead; a class's bias starts at its tokens' share.
    bias_init: BiasInit = "counts"
    # As in VQHead.
    implementation: HeadImplementation = "auto"

    @property
    def form(self) -> Literal["product"]:
        """That of the codes, see `VQHead`."""
        return "product"

    def sizes(self, vocab_size: int) -> tuple[int, int, int]:
        """Classes, frequent tokens, and tokens of a class at most.

        A size that is not given makes room for one that is.
        """
        usual = min(round(4 * vocab_size**0.5), -(-vocab_size // 3))
        num_classes, num_frequent = self.num_classes, self.num_frequent
        if num_frequent is None:
            num_frequent = max(0, min(usual, vocab_size - (num_classes or 1)))
        if num_classes is None:
            num_classes = max(1, min(usual, vocab_size - num_frequent))
        return num_classes, num_frequent, -(-(vocab_size - num_frequent) // num_classes)

    def codes(self) -> VQHead:
        """A head of the same codes without classes."""
        return VQHead(
            num_codes=self.num_codes,
            num_codebooks=self.num_codebooks,
            form=self.form,
            assignment=self.assignment,
            token_map=self.token_map,
            code_init=self.code_init,
            token_scale=self.token_scale,
            tied=self.tied,
            token_bias=self.token_bias,
            bias_init=self.bias_init,
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FullHead:
    """The ordinary output layer: V rows of width embed_dim."""

    kind: Literal["full"] = "full"
    # The rows are those of the input embedding: one table, trained by both uses.
    tied: bool = False
    # Rows start random, or from vectors of co-occurrence counts (see `python -m vqcx_jax.maps`).
    start: Literal["random", "cooccurrence"] = "random"
    # How the loss is computed. "plain" keeps the logits of all positions; "streamed" holds a block
    # of them at a time; the training loss makes its gradients in the same pass.
    implementation: Literal["plain", "streamed"] = "plain"
    token_bias: bool = False
    # As in VQHead.
    bias_init: BiasInit = "zeros"
    # Products of rows and hidden state go through cap * tanh(z / cap), before the token's bias.
    # None: as they are.
    logit_soft_cap: PositiveFloat | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LowRankHead:
    """A full output layer whose V x embed_dim weights are a product of two thin matrices."""

    kind: Literal["low_rank"] = "low_rank"
    rank: Positive = 64
    token_bias: bool = False
    # As in VQHead.
    bias_init: BiasInit = "zeros"
    # As in FullHead.
    logit_soft_cap: PositiveFloat | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaptiveHead:
    """Adaptive softmax (Grave et al. 2017): rare tokens in clusters, with narrower vectors."""

    kind: Literal["adaptive"] = "adaptive"
    # Ranks by frequency at which clusters begin; those before the first have full width.
    cutoffs: tuple[Positive, ...] = (512, 2048)
    # Cluster i has vectors of width embed_dim / div_value^(i + 1).
    div_value: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    head_bias: bool = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HierarchicalHead:
    """Hierarchical softmax over tokens ordered by frequency."""

    kind: Literal["hierarchical"] = "hierarchical"
    # "two_level": a softmax over classes of about sqrt(V) tokens, and one within the class;
    # "huffman": a sigmoid at each step through a Huffman tree.
    tree: Literal["two_level", "huffman"] = "two_level"
    # One for every class and token, or for every inner node.
    bias: bool = True


HeadConfig = VQHead | ClassVQHead | FullHead | LowRankHead | AdaptiveHead | HierarchicalHead
