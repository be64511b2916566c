"""Makes a token map: python -m vqcx_jax.maps --config=configs/NAME.py --output=map.npz ...

Or writes that of a run: python -m vqcx_jax.maps --from_run=DIR --output=map.npz
"""

import dataclasses
import datetime
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

import vqcx_jax
from vqcx_jax import cli, data
from vqcx_jax.config import apply_overrides, check_vocab_size, load_config, schema, validate
from vqcx_jax.data import Corpus, Tokenizer
from vqcx_jax.errors import UserError
from vqcx_jax.maps import describe
from vqcx_jax.maps.flags import Flags, Head, head_of, options_of
from vqcx_jax.maps.from_vectors import map_from_vectors
from vqcx_jax.maps.run_map import run_map
from vqcx_jax.maps.run_vectors import head_vectors
from vqcx_jax.maps.vectors import cooccurrence_vectors, load_vectors
from vqcx_jax.maps.widths import rank_for, widen_map
from vqcx_jax.paths import check_directory, local_path

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
    head, method = head_of(config.model.head, flags)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, head=head))
    config = validate(config)
    options = options_of(flags, head, method)
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
        "corpus": corpus.record(),
        "count_tokens": limit,
        "tokenizer": data.tokenizer_fingerprint(tokenizer),
        **_now(),
    }


def _now() -> dict[str, str]:
    return {
        "vqcx_jax": vqcx_jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _overrides(flags: Flags, head: Head) -> list[str]:
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
