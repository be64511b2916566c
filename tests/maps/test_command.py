"""python -m vqcx_jax.maps: text to map, map to a run, and what a user's mistakes look like."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import save_checkpoint, tiny_config

import vqcx_jax
from vqcx_jax import cli, data
from vqcx_jax.config import apply_overrides, schema, to_json
from vqcx_jax.maps import TokenMap, __main__, flags
from vqcx_jax.maps.from_vectors import Options, map_from_vectors
from vqcx_jax.maps.vectors import cooccurrence_vectors
from vqcx_jax.nn.build import build_model
from vqcx_jax.training.setup import prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(
        "from vqcx_jax.config import from_json\n"
        f"def get_config(): return from_json({to_json(tiny_config(tmp_path))!r})\n"
    )
    return path


def command(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, *arguments: str
) -> tuple[TokenMap, Path]:
    output = config_file.parent / "map.npz"
    argv = ["maps", f"--config={config_file}", f"--output={output}", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    __main__.main()
    return TokenMap.load(output), output


def next_command(output: str) -> list[str]:
    (line,) = [line for line in output.splitlines() if line.startswith("next: ")]
    return shlex.split(line.removeprefix("next: "))


PRODUCT = ["--method=product", "--num_codebooks=4", "--num_codes=8"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method=kmeans", "--num_codes=20", "--window=2"],
        ["--method=residual", "--num_codebooks=2", "--num_codes=8", "--own=4", "--balanced=true"],
        [*PRODUCT, "--scale=true", "--rotate=true", "--unique=true", "--seed=3"],
        [*PRODUCT, "--scale=true", "--classes=9", "--frequent=5"],
        [*PRODUCT, "--scale=false", "--classes=9", "--frequent=0"],
    ],
)
def test_the_printed_command_trains_on_the_map(
    arguments: list[str],
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    token_map, _ = command(monkeypatch, config_file, *arguments)
    out = capsys.readouterr().out
    assert out.startswith("codes ") and "\nvectors " in out and "\nusage " in out
    assert ("--classes=9" in arguments) == ("\nclasses  9 of at most " in out)
    argv = next_command(out)
    assert argv[:4] == ["python", "train.py", f"--config={config_file}", "--workdir=runs/map"]
    overrides = [tuple(a.removeprefix("--config.").split("=", 1)) for a in argv[4:]]
    setup = prepare(apply_overrides(tiny_config(tmp_path), overrides), tmp_path / "run", None)
    used = setup.token_map
    assert used is not None and used.codebooks is not None and token_map.codebooks is not None
    np.testing.assert_array_equal(used.codes, token_map.codes)
    np.testing.assert_array_equal(used.codebooks, token_map.codebooks)
    assert ("--scale=true" in arguments) == (used.scale is not None)
    assert ("--own=4" in arguments) == (used.own_vectors is not None)
    assert ("--classes=9" in arguments) == (used.classes is not None)
    if used.classes is not None:
        assert token_map.classes is not None
        np.testing.assert_array_equal(used.classes.of_token, token_map.classes.of_token)
        np.testing.assert_array_equal(used.classes.codes, token_map.classes.codes)
        np.testing.assert_array_equal(used.classes.scale, token_map.classes.scale)
        assert np.sum(used.classes.of_token < 0) == (5 if "--frequent=5" in arguments else 0)
    build_model(setup.config, used, jax.random.key(0))


@pytest.mark.parametrize(
    ("of_config", "arguments", "expected"),
    [
        ({"kind": "class_vq"}, [], ("class_vq", 64, 4, True, 65, 65)),
        ({"kind": "class_vq"}, ["--classes=9", "--scale=false"], ("class_vq", 64, 4, False, 9, 65)),
        ({"kind": "class_vq"}, ["--classes=0"], ("vq", 64, 4, True, None, None)),
        ({"kind": "class_vq"}, ["--method=kmeans"], ("vq", 512, 1, False, None, None)),
        ({"kind": "full"}, ["--num_codebooks=4"], ("class_vq", 64, 4, True, 65, 65)),
        ({"num_codes": "9"}, [], ("vq", 9, 1, False, None, None)),
        ({"num_codes": "9"}, ["--num_codebooks=2"], ("vq", 9, 2, False, None, None)),
        (
            {"num_codes": "9", "num_codebooks": "4", "form": "product", "token_scale": "true"},
            [],
            ("vq", 9, 4, True, None, None),
        ),
    ],
)
def test_sizes_are_those_of_the_configuration(
    of_config: dict[str, str], arguments: list[str], expected: Any
) -> None:
    """What is not given; class_vq, with as many codebooks as its configuration, by default."""
    if of_config.get("kind") == "class_vq":
        of_config = {**of_config, "num_codebooks": "4"}
    overrides = [(f"model.head.{name}", value) for name, value in of_config.items()]
    config = apply_overrides(schema.Config(model=schema.Model(head=schema.VQHead())), overrides)
    given, _ = cli.parse_args(flags.Flags, ["--output=map.npz", *arguments])
    head, method = flags.head_of(config.model.head, given)
    options = flags.options_of(given, head, method)
    assert options.num_codes == head.num_codes and options.num_codebooks == head.num_codebooks
    assert options.scale == head.token_scale
    sizes = None, None
    if isinstance(head, schema.ClassVQHead):
        sizes = head.sizes(264)[:2]
    assert (head.kind, head.num_codes, head.num_codebooks, head.token_scale, *sizes) == expected


def test_provenance(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token_map, path = command(monkeypatch, config_file, *PRODUCT, "--seed=3", "--dim=12")
    provenance = dict(token_map.provenance)
    assert provenance["options"]["num_codebooks"] == 4
    assert provenance["seed"] == 3
    assert provenance["vqcx_jax"] == vqcx_jax.__version__
    assert provenance["vectors"] == {
        "source": "cooccurrence",
        "dim": 12,
        "window": 4,
        "num_contexts": 20_000,
    }
    assert provenance["corpus"]["name"] == "text_files" and provenance["corpus"]["fingerprint"]
    assert provenance["count_tokens"] == 20_000_000
    assert {"tokenizer", "date", "distortion"} <= provenance.keys()
    # Narrower vectors than the model's are widened.
    assert token_map.codebooks is not None and token_map.codebooks[0].shape == (8, 16 // 4)
    assert "--config.model.head.code_init=centroids" in next_command(capsys.readouterr().out)
    before = path.read_bytes()
    again, _ = command(monkeypatch, config_file, *PRODUCT, "--seed=4", "--overwrite=true")
    assert path.read_bytes() != before
    assert again.provenance["seed"] == 4


def test_wider_vectors_than_the_models_give_codes_alone(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token_map, _ = command(monkeypatch, config_file, *PRODUCT, "--dim=20")
    assert token_map.codebooks is not None and token_map.codebooks[0].shape == (8, 20 // 4)
    assert "--config.model.head.code_init=random" in next_command(capsys.readouterr().out)


def test_only_the_first_tokens_are_counted(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited, _ = command(monkeypatch, config_file, *PRODUCT, "--config.data.count_tokens=700")
    setup = prepare(tiny_config(tmp_path), tmp_path / "run", None)
    documents, left = [], 700
    for document in data.encoded_documents(setup.tokenizer, setup.corpus.split("train")):
        documents.append(document[:left])
        left -= len(documents[-1])
    assert len(documents[-1]) == 0  # There is text behind the limit.
    expected = map_from_vectors(
        cooccurrence_vectors(documents, 264, 16),
        np.bincount(np.concatenate(documents), minlength=264),
        Options(method="product", num_codebooks=4, num_codes=8),
        seed=0,
    )
    np.testing.assert_array_equal(limited.codes, expected.codes)
    assert limited.provenance["count_tokens"] == 700


def test_own_overrides_are_kept(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token_bias = "--config.model.head.token_bias=false"
    command(monkeypatch, config_file, *PRODUCT, token_bias, "--config.train.steps=7")
    out = capsys.readouterr().out
    assert "\nfloor " in out  # Without a bias, tokens can be tied.
    assert {token_bias, "--config.train.steps=7"} <= set(next_command(out))


def test_vectors_from_a_file_and_from_a_run(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tiny_config(tmp_path, model__head__kind="full")
    state = save_checkpoint(full, tmp_path / "run")
    np.save(tmp_path / "v.npy", state.params["head"]["weights"])
    options = [*PRODUCT, "--overwrite=true"]
    of_run, _ = command(monkeypatch, config_file, *options, f"--vectors={tmp_path / 'run'}")
    of_file, _ = command(monkeypatch, config_file, *options, f"--vectors={tmp_path / 'v.npy'}")
    np.testing.assert_array_equal(of_run.codes, of_file.codes)
    of_text, _ = command(monkeypatch, config_file, *options)
    assert not np.array_equal(of_run.codes, of_text.codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=vq"], "--method='vq': must be 'kmeans', 'residual' or 'product'"),
        (["--output=gs://bucket/map.npz"], "--output='gs://bucket/map.npz': must be a path"),
        (["--num_codes=0"], "--num_codes='0': must be greater than or equal to 1"),
        (["--num_codes=300"], "model.head.num_codes=300: must be at most model.vocab_size=264"),
        (
            ["--num_codebooks=5", "--method=product"],
            "model.head.num_codebooks=5: must divide model.embed_dim=16",
        ),
        (["--method=kmeans", "--num_codebooks=2"], "num_codebooks=2: must be 1 for method='kmean"),
        (["--method=residual", "--rotate=true"], "rotate=True: needs method='product'"),
        (["--vectors=none.npy"], "vectors='none.npy': no such file"),
        (["--vectors=.", "--dim=3"], "--dim=3: needs --vectors=cooccurrence"),
        (["--vectors=.", "--window=4"], "--window=4: needs --vectors=cooccurrence"),
        (["--vectors=.", "--num_contexts=9"], "--num_contexts=9: needs --vectors=cooccurrence"),
        (["--output=config.py/map.npz"], "--output='config.py': must be a directory, 'config.py'"),
        (["--dim=264"], "dim=264: must be at most 263"),
        (["--config.data.dataset.path=nowhere"], "data.dataset.path='nowhere'"),
        (["--num_codes=8", "--num_codebooks=2", "--unique=true"], "num_codes=8, num_codebooks=2"),
        (["--num_codes=100"], "num_codes=100: must be at most "),
        (
            [*PRODUCT, "--classes=300"],
            "model.head.num_classes=300: must be at most model.vocab_size=264 less",
        ),
        (
            [*PRODUCT, "--classes=3", "--frequent=264"],
            "model.head.num_frequent=264: must be less than model",
        ),
        ([*PRODUCT, "--classes=3", "--own=2"], "own=2: must be 0 with classes=3"),
        (
            [*PRODUCT, "--classes=3", "--method=residual"],
            "classes=3: needs method='product', not 'residual'",
        ),
        (["--num_codes=8", "--frequent=3"], "frequent=3: needs classes of 1 or more"),
        (
            [*PRODUCT, "--classes=3", "--config.train.z_loss=0.1"],
            "train.z_loss=0.1: has no effect on",
        ),
    ],
)
def test_mistakes(
    arguments: Sequence[str],
    message: str,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(config_file.parent)
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: command(monkeypatch, config_file, *arguments) and None)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not (config_file.parent / "map.npz").exists()


def test_existing_output_is_left_alone(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config_file.parent / "map.npz"
    path.write_text("precious")
    with pytest.raises(vqcx_jax.errors.UserError, match="^--output='.*map.npz': exists; --overw"):
        command(monkeypatch, config_file, *PRODUCT)
    assert path.read_text() == "precious"
    path.unlink()
    path.mkdir()
    with pytest.raises(vqcx_jax.errors.UserError, match="^--output='.*map.npz': is a directory"):
        command(monkeypatch, config_file, *PRODUCT, "--overwrite=true")


def test_is_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "vqcx_jax.maps", "--config=none.py", "--output=x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: none.py: no such configuration file")
