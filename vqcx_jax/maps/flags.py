"""Flags of the map command, and the head and the map that they and a configuration ask for."""

import dataclasses
from typing import Annotated, Any, Literal

from vqcx_jax.config import schema
from vqcx_jax.config.schema.types import NonNegative, NonNegativeFloat, Positive
from vqcx_jax.maps.from_vectors import Options

Head = schema.VQHead | schema.ClassVQHead
Method = Literal["kmeans", "residual", "product"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Makes a token map for a VQ head: tokens with near vectors share codes.

    Text, tokenizer and embed_dim are those of the configuration, and so are the sizes of the map
    that are not given (of class_vq by default, if its head has no codes). Of a long text the first
    --config.data.count_tokens tokens are counted.
    """

    output: Annotated[str, "file to write, .npz"]
    config: Annotated[str | None, "configuration file; needed without from_run"] = None
    from_run: Annotated[
        str | None, "write the codes that this run has ended with; takes no config"
    ] = None
    method: Annotated[
        Literal["kmeans", "residual", "product"] | None,
        "kmeans: one codebook; residual: several for form=additive; product: for form=product",
    ] = None
    vectors: Annotated[
        str, "cooccurrence: of the training text; FILE.npy; or directory of a run with a full head"
    ] = "cooccurrence"
    num_codebooks: Annotated[Positive | None, "codes per token"] = None
    num_codes: Annotated[Positive | None, "code vectors per codebook"] = None
    power: Annotated[NonNegativeFloat, "a token counts (its occurrences)^power"] = 0.5
    scale: Annotated[bool | None, "quantise directions, and keep a scale per token"] = None
    own: Annotated[
        NonNegative | None, "so many of the most frequent tokens keep their own vector"
    ] = None
    unique: Annotated[bool, "no two tokens share all their codes"] = False
    balanced: Annotated[bool, "codes are used by equally many tokens"] = False
    rotate: Annotated[bool, "product: learn a rotation first"] = False
    classes: Annotated[
        NonNegative | None, "product: put tokens into so many classes, for class_vq; 0: for vq"
    ] = None
    frequent: Annotated[
        NonNegative | None, "with classes: most frequent tokens that are in none"
    ] = None
    dim: Annotated[
        Positive | None, "cooccurrence: width, widened to embed_dim; none: that, up to 512"
    ] = None
    window: Annotated[Positive | None, "cooccurrence: tokens on each side; none: 4"] = None
    num_contexts: Annotated[
        Positive | None, "cooccurrence: most frequent tokens as contexts; none: 20,000"
    ] = None
    seed: Annotated[NonNegative, "same seed, same map"] = 0
    overwrite: Annotated[bool, "replace an existing file"] = False


def head_of(head: schema.HeadConfig, flags: Flags) -> tuple[Head, Method]:
    """The head that takes the map, as the configuration and the flags have it, and the method."""
    if not isinstance(head, Head):
        head = schema.ClassVQHead()
    if flags.classes is None:
        asked_for = flags.method in (None, "product") and not flags.own
        in_classes = isinstance(head, schema.ClassVQHead) and asked_for
    else:
        in_classes = flags.classes > 0
    of_map: dict[str, Any] = {
        "num_codes": flags.num_codes,
        "num_codebooks": flags.num_codebooks,
        "token_scale": flags.scale,
    }
    method = flags.method
    if in_classes:
        head = head if isinstance(head, schema.ClassVQHead) else schema.ClassVQHead()
        of_map |= {"num_classes": flags.classes, "num_frequent": flags.frequent}
        method = method or "product"
    else:
        if isinstance(head, schema.ClassVQHead):
            head = head.codes() if flags.method in (None, "product") else schema.VQHead()
        many = (flags.num_codebooks or head.num_codebooks) > 1
        by_form: Method = "product" if head.form == "product" else "residual"
        method = method or (by_form if many else "kmeans")
        form = "product" if method == "product" else "additive"
        of_map |= {"form": form, "num_own_tokens": flags.own}
        if method == "kmeans" and flags.num_codebooks is None:
            of_map["num_codebooks"] = 1
    of_map = {name: value for name, value in of_map.items() if value is not None}
    of_map |= {"assignment": "file", "token_map": flags.output, "code_init": "random"}
    return dataclasses.replace(head, **of_map), method


def options_of(flags: Flags, head: Head, method: Method) -> Options:
    """How the map is made, but for the sizes of classes that follow from the vocabulary."""
    if isinstance(head, schema.ClassVQHead):
        own, classes, frequent = flags.own or 0, head.num_classes or 1, head.num_frequent or 0
    else:
        own, classes, frequent = head.num_own_tokens, 0, flags.frequent or 0
    return Options(
        method=method,
        num_codes=head.num_codes,
        num_codebooks=head.num_codebooks,
        power=flags.power,
        scale=head.token_scale,
        own=own,
        unique=flags.unique,
        balanced=flags.balanced,
        rotate=flags.rotate,
        classes=classes,
        frequent=frequent,
    )
