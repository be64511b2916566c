"""Draws what `attention_stats` computes. Needs matplotlib, the extra `plot`."""

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vqcx_jax.errors import UserError
from vqcx_jax.evaluation.attention_stats import AttentionByDistance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4
_LABELS = {
    "delta": "delta",
    "bias": "bias b, radians",
    "a": "a (real, then imaginary parts)",
    "weights": "weight w",
    "log_ratio": "ln of frequency over its start",
}
# What RoPE is, in white.
_CENTERS = {"delta": 1.0, "weights of r=1": 1.0}
_OF_KEY_HEADS = ("delta", "a", "log_ratio")


def require_matplotlib() -> None:
    """Raises UserError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("drawing needs matplotlib: install the extra vqcx_jax[plot]")


def draw(
    learned: dict[str, np.ndarray], by_distance: AttentionByDistance, title: str, path: Path
) -> None:
    """Writes a figure: a panel for each array, and one for each layer's attention by distance.

    Args:
        learned: from `learned_arrays`.
        by_distance: from `attention_by_distance`.
        title: of the figure.
        path: an .svg file.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    maps = _maps(learned)
    num_layers = len(by_distance.sums)
    num_panels = len(maps) + ("frequencies" in learned) + num_layers
    num_rows = math.ceil(num_panels / _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 3.2 * num_rows), layout="constrained")
    figure.suptitle(title if maps else f"{title}; nothing is learned of positions")
    grid = figure.subplots(num_rows, _COLUMNS, squeeze=False)
    panels = iter(grid.flat)
    for name, array in maps.items():
        _draw_map(next(panels), name, array)
    if "frequencies" in learned:
        _draw_frequencies(next(panels), learned["frequencies"])
    firsts = spaced_distances(len(by_distance.pairs))
    for layer, means_HxN in enumerate(by_distance.means(firsts)):
        _draw_layer(next(panels), layer, firsts, means_HxN)
    for panel in panels:
        panel.set_axis_off()
    figure.savefig(path, format="svg")


def spaced_distances(length: int) -> np.ndarray:
    """0, and whole numbers from 1 to below `length` that grow by about sqrt(2)."""
    powers = np.round(2 ** (np.arange(2 * math.log2(length)) / 2)).astype(int)
    return np.unique([0, *powers[powers < length]])


def _maps(learned: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Trained arrays, (L, P) or (L, H, P); harmonics (L, H, R, P) are R of them."""
    maps: dict[str, np.ndarray] = {}
    for name, array in learned.items():
        if array.ndim == 4:
            maps |= {f"{name} of r={r}": array[:, :, r] for r in range(array.shape[2])}
        elif name != "frequencies":
            maps[name] = array
    return maps


def _draw_map(axes: "Axes", name: str, array: np.ndarray) -> None:
    """Rows are the heads of all layers, or the layers; columns are planes or coordinates."""
    base, _, harmonic = name.partition(" of ")
    rows = array.reshape(-1, array.shape[-1])
    center = _CENTERS.get(name, 0.0)
    reach = float(np.abs(rows - center).max()) or 1.0
    image = axes.imshow(
        rows,
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        vmin=center - reach,
        vmax=center + reach,
    )
    axes.figure.colorbar(image, ax=axes)
    heads = len(rows) // len(array)
    for layer in range(1, len(array)):
        axes.axhline(layer * heads - 0.5, color="black", linewidth=0.5)
    layers = range(len(array))
    axes.set_yticks([heads * (layer + 0.5) - 0.5 for layer in layers], map(str, layers))
    kind = "key heads" if base in _OF_KEY_HEADS else "heads"
    axes.set_ylabel(f"layer, {heads} {kind} in each" if heads > 1 else "layer")
    axes.set_xlabel("plane" if base != "a" else "coordinate")
    axes.set_title(_LABELS[base] + (f" of {harmonic}" if harmonic else ""))


def _draw_frequencies(axes: "Axes", frequencies: np.ndarray) -> None:
    for row in frequencies.reshape(-1, frequencies.shape[-1]):
        axes.plot(np.where(row > 0, row, np.nan), linewidth=0.8)
    axes.set(yscale="log", xlabel="plane", title="frequency, radians per position")


def _draw_layer(axes: "Axes", layer: int, firsts: np.ndarray, means_HxN: np.ndarray) -> None:
    for head, means_N in enumerate(means_HxN):
        axes.plot(firsts, np.where(means_N > 0, means_N, np.nan), linewidth=0.8, label=str(head))
    axes.set_xscale("symlog", linthresh=1)
    axes.set(
        yscale="log", xlabel="distance, tokens", title=f"layer {layer}: mean weight by distance"
    )
    if len(means_HxN) <= 12:
        axes.legend(title="head", fontsize=6, title_fontsize=6, ncols=2)
