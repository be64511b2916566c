"""What a VQ head needs to know about the vocabulary before training: the code of every token."""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vqcx_jax.errors import DataError

_CODE_TYPES = (np.uint8, np.uint16, np.uint32)


@dataclass(frozen=True, eq=False)
class TokenClasses:
    """Classes of tokens, which have codes as tokens have; see `ops.codebook.classes`.

    Attributes:
        of_token: int32 (V,), the class of each token in [0, C); -1: none.
        codes: int32 (C, M), in the codebooks of the tokens.
        scale: float32 (C,) to start the classes' scales from; None: ones.
    """

    of_token: np.ndarray
    codes: np.ndarray
    scale: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Codes of V tokens in M codebooks, and optionally what a head starts from.

    Attributes:
        codes: int32 (V, M), column m in [0, K_m).
        num_codes: K_m of each codebook, at most V.
        codebooks: M arrays float32 (K_m, D_m) to start from; None: random ones.
        scale: float32 (V,) to start the tokens' scales from; None: ones.
        own_tokens: int32 (T,), tokens that get a vector of their own and whose codes are not used.
        own_vectors: float32 (T, D) to start from; None: random ones.
        classes: for heads of classes; None: no classes.
        bias: float32 (V,) to start the tokens' biases from; None: zeros.
        provenance: how the map was made, as JSON values. "tokenizer" is the fingerprint of the
            tokenizer whose tokens these are.

    Raises:
        DataError: fields that do not fit each other.
    """

    codes: np.ndarray
    num_codes: tuple[int, ...]
    codebooks: tuple[np.ndarray, ...] | None = None
    scale: np.ndarray | None = None
    own_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    own_vectors: np.ndarray | None = None
    classes: TokenClasses | None = None
    bias: np.ndarray | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_codes(self.codes, self.num_codes)
        _check_own_tokens(self.own_tokens, self.vocab_size)
        if self.codebooks is not None:
            if len(self.codebooks) != self.num_codebooks:
                raise DataError(
                    f"{len(self.codebooks)} codebooks: codes of {self.num_codebooks} need as many"
                )
            for codebook, k in zip(self.codebooks, self.num_codes, strict=True):
                _check_floats("codebooks", codebook, (k, None))
        if self.scale is not None:
            _check_floats("scale", self.scale, (self.vocab_size,))
        if self.bias is not None:
            _check_floats("bias", self.bias, (self.vocab_size,))
        if self.own_vectors is not None:
            _check_floats("own_vectors", self.own_vectors, (len(self.own_tokens), None))
        if self.classes is not None:
            _check_classes(self.classes, self.vocab_size, self.num_codes)
            if (self.classes.scale is None) != (self.scale is None):
                raise DataError("class_scale: must be there if scale is, and only then")

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.codes)

    @property
    def num_codebooks(self) -> int:
        """M."""
        return len(self.num_codes)

    def coded_tokens(self) -> np.ndarray:
        """The V - T tokens that have no vector of their own, rising. int64 (V - T,)."""
        coded = np.ones(self.vocab_size, bool)
        coded[self.own_tokens] = False
        return np.flatnonzero(coded)

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of the map: a fingerprint of codes and classes, and provenance."""
        of_token = np.zeros(0, np.int32)
        if self.classes is not None:
            of_token = np.concatenate([self.classes.of_token, self.classes.codes.ravel()])
        hashed = hashlib.sha256(repr((self.codes.shape, self.num_codes)).encode())
        for array in (self.codes, self.own_tokens, of_token):
            hashed.update(array.astype("<i4").tobytes())
        return {"fingerprint": hashed.hexdigest()[:16], "provenance": dict(self.provenance)}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything but the provenance, by name."""
        arrays = {
            "codes": self.codes.astype(np.min_scalar_type(max(self.num_codes) - 1)),
            "num_codes": np.asarray(self.num_codes, np.int64),
            "own_tokens": self.own_tokens,
        }
        for m, codebook in enumerate(self.codebooks or ()):
            arrays[f"codebook_{m}"] = codebook
        if self.scale is not None:
            arrays["scale"] = self.scale
        if self.bias is not None:
            arrays["bias"] = self.bias
        if self.own_vectors is not None:
            arrays["own_vectors"] = self.own_vectors
        if self.classes is not None:
            arrays["class_of_token"] = self.classes.of_token
            arrays["class_codes"] = self.classes.codes
            if self.classes.scale is not None:
                arrays["class_scale"] = self.classes.scale
        return arrays

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], provenance: Mapping[str, Any]
    ) -> "TokenMap":
        """What `to_arrays` took apart, all of it checked.

        Raises:
            DataError: arrays of other types or that do not fit each other.
            KeyError: one that is needed is not there.
        """
        codes, num_codes = arrays["codes"], arrays["num_codes"]
        if codes.dtype not in _CODE_TYPES or num_codes.dtype != np.int64 or num_codes.ndim != 1:
            raise DataError(
                "codes, num_codes: must be uint8, uint16 or uint32, and int64 of one axis, "
                f"got {codes.dtype} and {num_codes.dtype} {num_codes.shape}"
            )
        codebooks = tuple(
            arrays[f"codebook_{m}"] for m in range(len(num_codes)) if "codebook_0" in arrays
        )
        return cls(
            # 2^31 and more become negative, which is out of range too.
            codes=codes.astype(np.int32),
            num_codes=tuple(num_codes.tolist()),
            codebooks=codebooks or None,
            scale=arrays.get("scale"),
            own_tokens=arrays["own_tokens"],
            own_vectors=arrays.get("own_vectors"),
            classes=_classes_from(arrays),
            bias=arrays.get("bias"),
            provenance=provenance,
        )

    def save(self, path: Path) -> None:
        """Writes an .npz file (arrays only, no pickles), whole or not at all.

        Raises:
            DataError: the file cannot be written.
        """
        arrays = self.to_arrays() | {"provenance": np.asarray(json.dumps(self.provenance))}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, arrays)
        except OSError as error:
            raise DataError(
                f"token map {str(path)!r}: cannot be written: {error.strerror}"
            ) from error

    @classmethod
    def load(
        cls, path: Path, *, vocab_size: int | None = None, tokenizer: str | None = None
    ) -> "TokenMap":
        """Reads what `save` wrote and checks all of it.

        Args:
            path: the file.
            vocab_size: the V that is needed; None: any.
            tokenizer: fingerprint of the tokenizer in use; None: any. A map whose provenance names
                no tokenizer fits every one.

        Raises:
            DataError: not a token map, a damaged one, or one made for another vocabulary.
        """
        arrays = _read(path)
        try:
            token_map = cls.from_arrays(arrays, _provenance(arrays["provenance"]))
        except KeyError as error:
            raise DataError(f"token map {str(path)!r}: has no array {error}") from None
        except DataError as error:
            raise DataError(f"token map {str(path)!r}: {error}") from None
        made_for = token_map.provenance.get("tokenizer", tokenizer)
        if vocab_size not in (None, token_map.vocab_size):
            raise DataError(
                f"token map {str(path)!r}: made for another vocabulary, of {token_map.vocab_size} "
                f"tokens; must be of {vocab_size}"
            )
        if tokenizer is not None and made_for != tokenizer:
            raise DataError(
                f"token map {str(path)!r}: made for another vocabulary, of the tokenizer "
                f"{made_for}; must be of {tokenizer}"
            )
        return token_map


def _check_codes(codes: np.ndarray, num_codes: tuple[int, ...]) -> None:
    if codes.dtype != np.int32 or codes.ndim != 2 or codes.shape[1] != len(num_codes):
        raise DataError(
            f"codes: must be int32 of shape (vocab_size, {len(num_codes)}), a column for each of "
            f"num_codes={num_codes}, got {codes.dtype} {codes.shape}"
        )
    if not num_codes or len(codes) == 0:
        raise DataError(f"codes of shape {codes.shape}: must have a token and a codebook")
    if not all(1 <= k <= len(codes) for k in num_codes):
        raise DataError(
            f"num_codes={num_codes}: must be in 1 .. {len(codes)}, the number of tokens"
        )
    for m, k in enumerate(num_codes):
        low, high = codes[:, m].min(), codes[:, m].max()
        if low < 0 or high >= k:
            raise DataError(
                f"codes of codebook {m}: must be in [0, {k}), got {low if low < 0 else high}"
            )


def _check_classes(classes: TokenClasses, vocab_size: int, num_codes: tuple[int, ...]) -> None:
    of_token, codes = classes.of_token, classes.codes
    if of_token.dtype != np.int32 or of_token.shape != (vocab_size,):
        raise DataError(
            f"class_of_token: must be int32 ({vocab_size},), got {of_token.dtype} {of_token.shape}"
        )
    fits = codes.ndim == 2 and codes.shape[0] > 0 and codes.shape[1] == len(num_codes)
    if codes.dtype != np.int32 or not fits:
        raise DataError(
            f"class_codes: must be int32 of shape (num_classes, {len(num_codes)}), of a class or "
            f"more, got {codes.dtype} {codes.shape}"
        )
    if codes.min() < 0 or np.any(codes >= np.asarray(num_codes)):
        raise DataError(f"class_codes: must be in [0, num_codes={num_codes})")
    used = np.unique(of_token[of_token != -1])
    if not np.array_equal(used, np.arange(len(codes))):
        raise DataError(
            f"class_of_token: must be -1 or in [0, {len(codes)}), and no class without a token"
        )
    if classes.scale is not None:
        _check_floats("class_scale", classes.scale, (len(codes),))


def _check_own_tokens(own_tokens: np.ndarray, vocab_size: int) -> None:
    if own_tokens.dtype != np.int32 or own_tokens.ndim != 1:
        raise DataError(
            f"own_tokens: must be int32 of one axis, got {own_tokens.dtype} {own_tokens.shape}"
        )
    inside = np.all((own_tokens >= 0) & (own_tokens < vocab_size))
    if not inside or len(np.unique(own_tokens)) < len(own_tokens):
        raise DataError(f"own_tokens: must be distinct and in [0, {vocab_size})")


def _check_floats(name: str, array: np.ndarray, shape: tuple[int | None, ...]) -> None:
    fits = array.ndim == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, array.shape, strict=True)
    )
    if array.dtype != np.float32 or not fits:
        wanted = str(shape).replace("None", "D")
        raise DataError(f"{name}: must be float32 {wanted}, got {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise DataError(f"{name}: must not contain NaN or infinity")


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    # Not tempfile's: that would be readable by its owner alone.
    temporary = path.with_name(f"incomplete.{os.getpid()}.{path.name}")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # No array is named allow_pickle.
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    try:
        # Not np.load, which would take an .npy file too.
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                with archive.open(entry) as file:
                    arrays[entry.removesuffix(".npy")] = np.lib.format.read_array(file)
    except FileNotFoundError:
        raise DataError(f"token map {str(path)!r}: no such file") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"token map {str(path)!r}: not a readable .npz file") from error
    return arrays


def _provenance(text: np.ndarray) -> dict[str, Any]:
    try:
        provenance = json.loads(str(text))
    except ValueError:
        provenance = None
    if not isinstance(provenance, dict):
        raise DataError("provenance: must be a JSON object")
    return provenance


def _classes_from(arrays: Mapping[str, np.ndarray]) -> TokenClasses | None:
    if arrays.keys().isdisjoint({"class_of_token", "class_codes", "class_scale"}):
        return None
    return TokenClasses(arrays["class_of_token"], arrays["class_codes"], arrays.get("class_scale"))
