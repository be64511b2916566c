"""Attention: how scores come to depend on phases and positions.

Every kind but the last two turns queries and keys by position times frequency, plane by plane
(`vqcx_jax.ops.attention.rotary`), and has the fields of `Rotary`.
"""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vqcx_jax.config.schema.types import STRICT, Positive, PositiveFloat


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AttentionOptions:
    """What every attention has."""

    # A query sees its last so many positions, its own among them. None: all before it.
    window: Positive | None = None
    # Scores go through cap * tanh(score / cap). None: as they are.
    logit_soft_cap: PositiveFloat | None = None
    # Queries and keys have a mean square of 1, times a trained gain, before they are turned.
    qk_norm: bool = False
    # Kernels for TPUs ("pallas_tpu") or NVIDIA GPUs ("cudnn"), or plain JAX ("xla"). "auto":
    # kernels where they can. Over a KV cache there is one for TPUs alone, of at most 16 tokens at a
    # time: longer prompts, and all steps of "cudnn", go by plain JAX.
    implementation: Literal["auto", "xla", "pallas_tpu", "cudnn"] = "auto"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Rotary(AttentionOptions):
    """Frequencies of the planes."""

    rope_base: PositiveFloat = 10_000.0
    # Share of the planes that turn, those of the highest frequencies; the rest carry content only.
    rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    # "per_head": frequencies of the key heads lie between one another
    # (`ops.attention.per_head_frequencies`).
    frequencies: Literal["shared", "per_head"] = "shared"
    # Frequencies are trained, in every layer, from where they start.
    learned_frequencies: bool = False
    # Longer contexts than in training, see `vqcx_jax.ops.attention.extension`.
    extension: Literal["none", "linear", "ntk", "yarn"] = "none"
    # The new length over the old one.
    extension_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    # The old length in positions, for "yarn".
    trained_length: Positive | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ComplexAttention(Rotary):
    """Complex multi-head attention: score = Re sum_i q_i conj(k_i), turned by Adapt and Delta.

    Adapt(AS) = delta AS + b, with a delta of every key head and plane, and a b of every query head
    and plane.
    """

    kind: Literal["complex"] = "complex"
    # "published": delta ~ N(0, 1/sqrt(head_dim/2)); "one": delta = 1, which starts as RoPE.
    delta_init: Literal["published", "one"] = "one"
    # Scores are divided by sqrt(head_dim); the published code does not.
    scaled: bool = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EulerFormerAttention(Rotary):
    """Complex attention with delta and b shared by the heads of a layer (Tian et al. 2024)."""

    kind: Literal["eulerformer"] = "eulerformer"
    # The public code has one delta and one b; False is the form it names beside it.
    share_planes: bool = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AmplitudeAttention(Rotary):
    """Complex attention with delta = 0: of queries and keys only amplitudes count."""

    kind: Literal["amplitude"] = "amplitude"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SmoothAttention(Rotary):
    """Complex attention with an Adapt without branch cut (`vqcx_jax.ops.attention.smooth`)."""

    kind: Literal["smooth"] = "smooth"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HarmonicAttention(Rotary):
    """Complex attention with a sum of harmonics for Adapt (`vqcx_jax.ops.attention.harmonics`).

    Queries and keys become num_harmonics times as wide.
    """

    kind: Literal["harmonic"] = "harmonic"
    # r = 0 .. num_harmonics - 1; it starts with r = 1 only, as RoPE.
    num_harmonics: Annotated[int, Field(ge=2)] = 2


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RopeAttention(Rotary):
    """Rotary position embedding, half-split pairing; rope_fraction makes it p-RoPE."""

    kind: Literal["rope"] = "rope"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PopeAttention(Rotary):
    """PoPE: amplitudes carry content and phases positions; queries and keys twice as wide.

    Each of the head_dim coordinates is a plane of its own.
    """

    kind: Literal["pope"] = "pope"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AlibiAttention(AttentionOptions):
    """ALiBi: a penalty proportional to distance."""

    kind: Literal["alibi"] = "alibi"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NopeAttention(AttentionOptions):
    """No positions but the causal mask."""

    kind: Literal["nope"] = "nope"


AttentionConfig = (
    ComplexAttention
    | SmoothAttention
    | HarmonicAttention
    | EulerFormerAttention
    | AmplitudeAttention
    | RopeAttention
    | PopeAttention
    | AlibiAttention
    | NopeAttention
)
