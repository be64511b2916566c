"""Makes a token map: python -m vqcx_jax.maps --config=configs/NAME.py --output=map.npz ...

Or writes that of a run: python -m vqcx_jax.maps --from_run=DIR --output=map.npz
"""

import dataclasses
import datetime
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

import vqcx_jax
from vqcx_jax import cli, data
from vqcx_jax.config import apply_overrides, check_vocab_size, load_config, schema, validate
from vqcx_jax.config.schema.types import NonNegative, NonNegativeFloat, Positive
from vqcx_jax.data import Corpus, Tokenizer
from vqcx_jax.errors import UserError
from vqcx_jax.maps import describe
from vqcx_jax.maps.from_vectors import Options, map_from_vectors
from vqcx_jax.maps.run_map import run_map
from vqcx_jax.maps.run_vectors import head_vectors
from vqcx_jax.maps.vectors import cooccurrence_vectors, load_vectors
from vqcx_jax.maps.widths import rank_for, widen_map
from vqcx_jax.paths import check_directory, local_path

_Head = schema.VQHead | schema.ClassVQHead
_Method = Literal["kmeans", "residual", "product"]
# Fields of the head that must be as the map is, besides its path.
_SET_BY_MAP = {
    "kind",
    "assignment",
    "num_codes",
    "num_codebooks",
    "form",
    "num_own_tokens",
    "num_classes",
    "num_frequent",
    "token_scale",
    "code_init",
}


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


def main() -> None:
    """Makes the map, or takes that of a run, writes it and says what it is."""
    flags, overrides = cli.parse_args(Flags, sys.argv[1:])
    if flags.from_run is not None:
        _export(flags, flags.from_run, overrides)
    elif flags.config is not None:
        _make(flags, flags.config, overrides)
    else:
        raise UserError("--config: is missing, must be given without --from_run")


def _export(flags: Flags, from_run: str, overrides: list[tuple[str, str]]) -> None:
    """Writes the map of a run."""
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if field.name not in {"from_run", "output", "overwrite"} and value != field.default:
            raise UserError(f"--{field.name}={value!r}: must not be given with --from_run")
    if overrides:
        path, value = overrides[0]
        raise UserError(f"--config.{path}={value!r}: must not be given with --from_run")
    output = _output(flags)
    made, head = run_map(local_path("--from_run", from_run))
    token_map = dataclasses.replace(made, provenance={**made.provenance, **_now()})
    token_map.save(output)
    print(
        f"codes    {head.num_codebooks} x {head.num_codes} a token, for {token_map.vocab_size:,} "
        f"tokens, of step {token_map.provenance['run']['step']}"
    )
    head = dataclasses.replace(
        head, assignment="file", token_map=flags.output, code_init="centroids"
    )
    print("next: python train.py --config=CONFIG", shlex.join(_overrides(flags, head)))


def _make(flags: Flags, config_path: str, overrides: list[tuple[str, str]]) -> None:
    """Reads the text, makes the map and writes it."""
    config = apply_overrides(load_config(config_path), overrides)
    head, method = _head(config.model.head, flags)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, head=head))
    config = validate(config)
    options = _options(flags, head, method)
    output = _output(flags)

    cache_dir = data.cache_directory(config.data.cache_dir)
    corpus = data.open_corpus(config.data.dataset, cache_dir)
    tokenizer = data.build_tokenizer(config.data.tokenizer, corpus, cache_dir)
    limit = config.data.count_tokens
    check_vocab_size(config.model, tokenizer.vocab_size)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    counts = data.cached_token_counts(tokenizer, corpus, cache_dir, limit, vocab_size=vocab_size)
    if isinstance(head, schema.ClassVQHead):
        num_classes, num_frequent, _ = head.sizes(vocab_size)
        options = dataclasses.replace(options, classes=num_classes, frequent=num_frequent)
    slices = options.num_codebooks if method == "product" else 1
    vectors = _vectors(flags, config, corpus, tokenizer, vocab_size, slices)
    made = map_from_vectors(vectors, counts, options, flags.seed)
    width, embed_dim = vectors.shape[1], config.model.embed_dim
    if flags.vectors == "cooccurrence" and width < embed_dim:
        made, width = widen_map(made, embed_dim, slices), embed_dim
    sources = _sources(flags, vectors.shape[1], limit, corpus, tokenizer)
    token_map = dataclasses.replace(made, provenance={**made.provenance, **sources})
    token_map.save(output)

    print(
        describe(
            token_map,
            embed_dim=embed_dim,
            counts=counts,
            form=head.form,
            token_bias=head.token_bias,
            token_scale=head.token_scale,
        )
    )
    print(f"error    {token_map.provenance['distortion']:.2%} of the variance of the vectors")
    if width == embed_dim:
        head = dataclasses.replace(head, code_init="centroids")
    given = [f"--config.{path}={value}" for path, value in overrides]
    arguments = [f"--config={config_path}", *given, *_overrides(flags, head)]
    print("next:", shlex.join(["python", "train.py", *arguments]))


def _output(flags: Flags) -> Path:
    """The file to write, which is not there yet or may be replaced."""
    output = local_path("--output", flags.output)
    if output.is_dir():
        raise UserError(f"--output={flags.output!r}: is a directory, must be a file")
    check_directory("--output", output.parent)
    if output.exists() and not flags.overwrite:
        raise UserError(f"--output={flags.output!r}: exists; --overwrite=true replaces it")
    return output


def _head(head: schema.HeadConfig, flags: Flags) -> tuple[_Head, _Method]:
    """The head that takes the map, as the configuration and the flags have it, and the method."""
    if not isinstance(head, _Head):
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
        by_form: _Method = "product" if head.form == "product" else "residual"
        method = method or (by_form if many else "kmeans")
        form = "product" if method == "product" else "additive"
        of_map |= {"form": form, "num_own_tokens": flags.own}
        if method == "kmeans" and flags.num_codebooks is None:
            of_map["num_codebooks"] = 1
    of_map = {name: value for name, value in of_map.items() if value is not None}
    of_map |= {"assignment": "file", "token_map": flags.output, "code_init": "random"}
    return dataclasses.replace(head, **of_map), method


def _options(flags: Flags, head: _Head, method: _Method) -> Options:
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


def _vectors(
    flags: Flags,
    config: schema.Config,
    corpus: Corpus,
    tokenizer: Tokenizer,
    vocab_size: int,
    slices: int,
) -> np.ndarray:
    if flags.vectors == "cooccurrence":
        return cooccurrence_vectors(
            data.encoded_documents(tokenizer, corpus.split("train"), config.data.count_tokens),
            vocab_size,
            flags.dim or rank_for(config.model.embed_dim, slices),
            **_contexts(flags),
        )
    path = local_path("--vectors", flags.vectors)
    for name in ("dim", "window", "num_contexts"):
        if getattr(flags, name) is not None:
            raise UserError(
                f"--{name}={getattr(flags, name)}: needs --vectors=cooccurrence, not "
                f"{flags.vectors!r}"
            )
    if path.is_dir():
        return head_vectors(path, vocab_size, data.tokenizer_fingerprint(tokenizer))
    return load_vectors(path, vocab_size)


def _contexts(flags: Flags) -> dict[str, int]:
    return {"window": flags.window or 4, "num_contexts": flags.num_contexts or 20_000}


def _sources(
    flags: Flags, width: int, limit: int | None, corpus: Corpus, tokenizer: Tokenizer
) -> dict[str, Any]:
    return {
        "vectors": {"source": flags.vectors, "dim": width}
        | (_contexts(flags) if flags.vectors == "cooccurrence" else {}),
        "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint},
        "count_tokens": limit,
        "tokenizer": data.tokenizer_fingerprint(tokenizer),
        **_now(),
    }


def _now() -> dict[str, str]:
    return {
        "vqcx_jax": vqcx_jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _overrides(flags: Flags, head: _Head) -> list[str]:
    """Flags of train.py that give a run this head, in a directory that is named for the map."""
    of_head = [
        (f"model.head.{field.name}", str(getattr(head, field.name)).lower())
        for field in dataclasses.fields(head)
        if field.name in _SET_BY_MAP
    ]
    settings = [*of_head, ("model.head.token_map", flags.output)]
    workdir = f"--workdir={Path('runs', Path(flags.output).stem)}"
    return [workdir, *(f"--config.{path}={value}" for path, value in settings)]


if __name__ == "__main__":
    cli.run(main)
