"""Every option of the trainer, as frozen dataclasses. Defaults are the quickstart's.

A section with a `kind` field is one of several classes (a tagged union): `model.head.kind=full`
selects `FullHead`, whose fields are then the only ones accepted. What a single field may hold
is said by its type and is checked when the object is made; what fields must satisfy together
is checked once, by `vqcx_jax.config.validate`.
"""

import math
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", strict=True)

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
BiasInit = Literal["zeros", "counts"]
MeshAxis = Literal["data", "fsdp", "tensor"]
MeshAxes = tuple[MeshAxis, ...]


# ---------------------------------------------------------------- model


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ComplexAttention:
    """Complex multi-head attention: score = Re sum_i q_i conj(k_i), rotated by Adapt and Delta."""

    kind: Literal["complex"] = "complex"
    rope_base: PositiveFloat = 10_000.0
    # "published": delta ~ N(0, 1/sqrt(head_dim/2)); "one": delta = 1, which starts as RoPE.
    delta_init: Literal["published", "one"] = "one"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RopeAttention:
    """Rotary position embedding, half-split pairing."""

    kind: Literal["rope"] = "rope"
    rope_base: PositiveFloat = 10_000.0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
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
    # None: from vectors, unless there is a soft-cap.
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


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ClassVQHead:
    """Product codes in classes: frequent tokens beside classes of the others, tokens in a class."""

    kind: Literal["class_vq"] = "class_vq"
    num_codes: Positive = 256
    num_codebooks: Positive = 16
    # Classes at the first level. None: 4 sqrt(V), or V / 3 in a small vocabulary.
    num_classes: Positive | None = None
    # So many of the most frequent tokens stand at the first level. None: as many.
    num_frequent: NonNegative | None = None
    # Codes and classes, as in VQHead: "random", or from near vectors.
    assignment: Literal["random", "cooccurrence", "file"] = "cooccurrence"
    token_map: str | None = None
    code_init: Literal["random", "centroids"] = "centroids"
    token_scale: bool = True
    token_bias: bool = True
    # As in VQHead; a class's bias starts at its tokens' share.
    bias_init: BiasInit = "counts"

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
            token_bias=self.token_bias,
            bias_init=self.bias_init,
        )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
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


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LowRankHead:
    """A full output layer whose V x embed_dim weights are a product of two thin matrices."""

    kind: Literal["low_rank"] = "low_rank"
    rank: Positive = 64
    token_bias: bool = False
    # As in VQHead.
    bias_init: BiasInit = "zeros"
    # As in FullHead.
    logit_soft_cap: PositiveFloat | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AdaptiveHead:
    """Adaptive softmax (Grave et al. 2017): rare tokens in clusters, with narrower vectors."""

    kind: Literal["adaptive"] = "adaptive"
    # Ranks by frequency at which clusters begin; those before the first have full width.
    cutoffs: tuple[Positive, ...] = (512, 2048)
    # Cluster i has vectors of width embed_dim / div_value^(i + 1).
    div_value: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    head_bias: bool = False


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class HierarchicalHead:
    """Hierarchical softmax over tokens ordered by frequency."""

    kind: Literal["hierarchical"] = "hierarchical"
    # "two_level": a softmax over classes of about sqrt(V) tokens, and one within the class;
    # "huffman": a sigmoid at each step through a Huffman tree.
    tree: Literal["two_level", "huffman"] = "two_level"
    # One for every class and token, or for every inner node.
    bias: bool = True


HeadConfig = VQHead | ClassVQHead | FullHead | LowRankHead | AdaptiveHead | HierarchicalHead


@dataclass(frozen=True, kw_only=True, config=_STRICT)
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
    attention: ComplexAttention | RopeAttention = Field(
        default_factory=ComplexAttention, discriminator="kind"
    )
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


# ---------------------------------------------------------------- data


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PythonStdlib:
    """Source files of the running interpreter's standard library: real text, no network."""

    kind: Literal["python_stdlib"] = "python_stdlib"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TextFiles:
    """A file, directory or glob of .txt (one document a file) or .jsonl (one document a line)."""

    kind: Literal["text_files"] = "text_files"
    path: str = ""
    # None: `validation_fraction` of the documents of `path` are held out.
    validation_path: str | None = None
    validation_fraction: OpenFraction = 0.05
    text_field: str = "text"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class WikiText:
    """WikiText, word-level tokens, one article a document."""

    kind: Literal["wikitext2", "wikitext103"] = "wikitext2"
    # A directory with the train, validation and test files. None: downloaded.
    path: str | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TFDS:
    """A prepared tensorflow-datasets dataset: by name ("c4/en", "lm1b") or by directory."""

    kind: Literal["tfds"] = "tfds"
    name: str | None = None
    path: str | None = None
    text_field: str = "text"
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BytesTokenizer:
    """One token per UTF-8 byte, plus an end-of-document token: V = 257."""

    kind: Literal["bytes"] = "bytes"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class WordTokenizer:
    """White-space words of the training split; a line end is the token <eos>."""

    kind: Literal["word"] = "word"
    # None: every word type of the training split.
    max_vocab_size: Positive | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BPETokenizer:
    """A byte-level BPE trained on the first `train_documents` training documents, and cached."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=257)] = 4096
    train_documents: Positive = 20_000


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class JSONTokenizer:
    """A Hugging Face `tokenizers` JSON file (may be gzipped)."""

    kind: Literal["json"] = "json"
    path: str = ""
    # The end-of-document token. None: <|endoftext|>, </s> or the like, whichever the file has.
    eos_token: str | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SentencePieceTokenizer:
    """A SentencePiece .model file."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    path: str = ""


Dataset = PythonStdlib | TextFiles | WikiText | TFDS
Tokenizer = BytesTokenizer | WordTokenizer | BPETokenizer | JSONTokenizer | SentencePieceTokenizer


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Data:
    """Which text, how it becomes tokens, and how tokens become batches."""

    dataset: Dataset = Field(default_factory=PythonStdlib, discriminator="kind")
    tokenizer: Tokenizer = Field(default_factory=BPETokenizer, discriminator="kind")
    # Where prepared corpora and trained tokenizers are kept. None: ~/.cache/vqcx_jax.
    cache_dir: str | None = None
    seq_len: Positive = 256
    # Rows of seq_len tokens per optimizer step, over all processes and microbatches.
    batch_size: Positive = 16
    shuffle_seed: NonNegative = 0
    # Training documents in which tokens are counted, for heads that need it. None: all.
    count_documents: Positive | None = 100_000
    # Packed rows of one process that are shuffled together, so that a batch mixes documents.
    shuffle_rows: Positive = 1024
    # Documents that the loader reads ahead.
    prefetch: Positive = 64


# ---------------------------------------------------------------- optimisation


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Optimizer:
    """AdamW with warm-up and decay."""

    learning_rate: PositiveFloat = 2e-3
    # "wsd": warm-up, stable, then linear decay over the last `decay_fraction` of the steps.
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegative = 50
    decay_fraction: Fraction = 0.2
    # The learning rate ends at this fraction of its peak.
    final_fraction: Fraction = 0.1
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    epsilon: PositiveFloat = 1e-8
    # Not applied to norms, biases and attention phases.
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat | None = 1.0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Training:
    """The loop: how long, how often, what to keep."""

    steps: Positive = 300
    seed: NonNegative = 0
    # Microbatches per step: batch_size is split into this many, gradients are summed.
    grad_accumulation: Positive = 1
    # Coefficient of log(Z)^2 in the loss, for heads that have a Z.
    z_loss: NonNegativeFloat = 0.0
    log_every: Positive = 10
    # Periodic evaluation on the validation split; 0: only at the end.
    eval_every: NonNegative = 100
    # Validation batches in a periodic evaluation. None: the whole split.
    eval_batches: Positive | None = 20
    # Validation batches in the evaluation after the last step. None: the whole split.
    final_eval_batches: Positive | None = None
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 2
    # Keep for good every checkpoint whose step is a multiple of this. None: none.
    keep_every: Positive | None = None
    # bfloat16 peak of one device, for MFU. None: known TPUs and GPUs only.
    peak_flops: PositiveFloat | None = None
    # A sample printed at the end of training; tokens to generate (0: none).
    sample_tokens: NonNegative = 64
    sample_prompt: str = ""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Mesh:
    """Devices along each mesh axis; one of them may be -1: all that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    axis_type: Literal["explicit", "auto"] = "explicit"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ShardingRules:
    """Logical axis -> mesh axes. The one place that says what is sharded over what."""

    batch: MeshAxes = ("data", "fsdp")
    embed: MeshAxes = ("fsdp",)
    vocab: MeshAxes = ("tensor",)
    # Query and key heads alike: a query head and its key head are on one device.
    heads: MeshAxes = ("tensor",)
    mlp: MeshAxes = ("tensor",)
    codes: MeshAxes = ()


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """Everything that defines a run."""

    model: Model = Field(default_factory=Model)
    data: Data = Field(default_factory=Data)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    train: Training = Field(default_factory=Training)
    mesh: Mesh = Field(default_factory=Mesh)
    sharding: ShardingRules = Field(default_factory=ShardingRules)


def published_delta_std(head_dim: int) -> float:
    """Standard deviation of the published delta initialisation, 1/sqrt(P) with P planes."""
    return 1.0 / math.sqrt(head_dim // 2)
