"""The command line of the scripts: flags, `--config.path=value` overrides, exit codes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from vqcx_jax.config import schema
from vqcx_jax.config.messages import did_you_mean
from vqcx_jax.config.overrides import parse_value
from vqcx_jax.errors import NonFiniteLossError, UserError

Flags = TypeVar("Flags")

_OVERRIDE = "--config."

_OVERRIDE_HELP = f"""
any field of the configuration can be overridden:
  --config.model.num_layers=8
  --config.model.head.kind=full   another class of a section
  --config.model.vocab_size=none  no value
  --config.sharding.batch=data,fsdp
all fields and what they mean: {schema.__file__}
"""


def run(main: Callable[[], None]) -> None:
    """Runs a script's main function and ends the process as a user of a shell expects.

    A `UserError` becomes one line on stderr and exit code 2, a `NonFiniteLossError` one line
    and 1, Ctrl-C a quiet 130. Any other exception is a bug and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        _exit(error, 2)
    except NonFiniteLossError as error:
        _exit(error, 1)
    except KeyboardInterrupt:
        sys.exit(130)


def parse_args(
    flags: type[Flags], argv: Sequence[str], overridable: Sequence[str] = ()
) -> tuple[Flags, list[tuple[str, str]]]:
    """Reads a command line into a dataclass of flags.

    Args:
      flags: a dataclass with one field per flag: `step: Annotated[int | None, "help"] = None`
        is `--step=3` or `--step 3`. Types are parsed as those of the configuration are, pydantic
        constraints included. A field without a default is required. The docstring heads --help.
        With a field `config`, `--config.path=value` is an override.
      argv: the arguments without the program's name.
      overridable: paths that --help names, for a script without a field `config` that takes
        overrides of these only. The script checks it.

    Returns:
      The flags, and the overrides as (path, value) pairs for `apply_overrides`.

    Raises:
      UserError: an unknown flag, a flag without its value, or a value of the wrong type.
      SystemExit: after --help.
    """
    types = get_type_hints(flags, include_extras=True)
    override_help = _OVERRIDE_HELP if "config" in types else _overridable_help(overridable)
    rest, overrides = _split_overrides(argv) if override_help else (list(argv), [])
    required = [name for name in types if not hasattr(flags, name)]
    known, unknown = _parser(flags, types, required, override_help).parse_known_args(rest)
    if unknown:
        name = unknown[0].partition("=")[0]
        names = tuple(f"--{flag}" for flag in types)
        raise UserError(
            f"{name}: no such flag{did_you_mean(name, names)}; accepted are {', '.join(names)}"
        )
    texts: dict[str, str] = vars(known)
    for name in required:
        if name not in texts:
            raise UserError(f"--{name}: is missing, must be given: {_help_text(types[name])}")
    values = {name: parse_value(f"--{name}", types[name], text) for name, text in texts.items()}
    return flags(**values), overrides


def _exit(error: Exception, code: int) -> NoReturn:
    print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
    sys.exit(code)


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separates `--config.path=value` and `--config.path value` from all other arguments."""
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(_OVERRIDE):
            rest.append(argument)
            continue
        name, equals, value = argument.partition("=")
        if not equals:
            following = next(arguments, None)
            if following is None or following.startswith("--"):
                raise UserError(f"{name}: needs a value, as in {name}=VALUE")
            value = following
        overrides.append((name.removeprefix(_OVERRIDE), value))
    return rest, overrides


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def _help_text(annotation: Any) -> str:
    return get_args(annotation)[-1]


def _overridable_help(paths: Sequence[str]) -> str:
    lines = [f"\n  {_OVERRIDE}{path}=VALUE" for path in paths]
    return "".join(["fields of the configuration that can be overridden:", *lines]) if paths else ""


def _parser(flags: type, types: dict[str, Any], required: list[str], override_help: str) -> _Parser:
    usage = ["%(prog)s", *(f"--{name}=VALUE" for name in required), "[--FLAG=VALUE ...]"]
    if override_help:
        usage.append("[--config.PATH=VALUE ...]")
    parser = _Parser(
        usage=" ".join(usage),
        description=flags.__doc__,
        epilog=override_help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, annotation in types.items():
        default = "required" if name in required else f"default: {getattr(flags, name)!r}"
        parser.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,  # Only flags that were given are parsed further.
            metavar="VALUE",
            help=f"{_help_text(annotation)} ({default})".replace("%", "%%"),
        )
    return parser
