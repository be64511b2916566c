"""Every option of the trainer, as frozen dataclasses. Defaults are the quickstart's.

A section with a `kind` field is one of several classes (a tagged union): `model.head.kind=full`
selects `FullHead`, whose fields are then the only ones accepted. What a single field may hold
is said by its type and is checked when the object is made; what fields must satisfy together
is checked once, by `vqcx_jax.config.validate`.
"""

from pydantic import Field
from pydantic.dataclasses import dataclass

from vqcx_jax.config.schema.attention import (
    AlibiAttention,
    AmplitudeAttention,
    AttentionConfig,
    ComplexAttention,
    EulerFormerAttention,
    HarmonicAttention,
    NopeAttention,
    PopeAttention,
    RopeAttention,
    Rotary,
    SmoothAttention,
)
from vqcx_jax.config.schema.data import (
    TFDS,
    BPETokenizer,
    BytesTokenizer,
    Data,
    Dataset,
    JSONTokenizer,
    PythonStdlib,
    SentencePieceTokenizer,
    TextFiles,
    Tokenizer,
    WikiText,
    WordTokenizer,
)
from vqcx_jax.config.schema.heads import (
    AdaptiveHead,
    ClassVQHead,
    FullHead,
    HeadConfig,
    HierarchicalHead,
    LowRankHead,
    VQHead,
)
from vqcx_jax.config.schema.model import Model
from vqcx_jax.config.schema.sharding import Mesh, ShardingRules
from vqcx_jax.config.schema.training import Optimizer, Training
from vqcx_jax.config.schema.types import STRICT, MeshAxes, MeshAxis


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """Everything that defines a run."""

    model: Model = Field(default_factory=Model)
    data: Data = Field(default_factory=Data)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    train: Training = Field(default_factory=Training)
    mesh: Mesh = Field(default_factory=Mesh)
    sharding: ShardingRules = Field(default_factory=ShardingRules)


__all__ = [
    "TFDS",
    "AdaptiveHead",
    "AlibiAttention",
    "AmplitudeAttention",
    "AttentionConfig",
    "BPETokenizer",
    "BytesTokenizer",
    "ClassVQHead",
    "ComplexAttention",
    "Config",
    "Data",
    "Dataset",
    "EulerFormerAttention",
    "FullHead",
    "HarmonicAttention",
    "HeadConfig",
    "HierarchicalHead",
    "JSONTokenizer",
    "LowRankHead",
    "Mesh",
    "MeshAxes",
    "MeshAxis",
    "Model",
    "NopeAttention",
    "Optimizer",
    "PopeAttention",
    "PythonStdlib",
    "RopeAttention",
    "Rotary",
    "SentencePieceTokenizer",
    "ShardingRules",
    "SmoothAttention",
    "TextFiles",
    "Tokenizer",
    "Training",
    "VQHead",
    "WikiText",
    "WordTokenizer",
]
