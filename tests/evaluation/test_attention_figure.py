import sys
import xml.etree.ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from versions import oldest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.evaluation.attention_figure import draw, spaced_distances
from vqcx_jax.evaluation.attention_stats import AttentionByDistance

pytestmark = oldest_jax

BY_DISTANCE = AttentionByDistance(
    np.linspace(1.0, 0.0, 2 * 4 * 8).reshape(2, 4, 8), np.asarray([8, 7, 6, 5, 4, 0, 0, 0])
)


def test_spaced_distances() -> None:
    assert spaced_distances(1).tolist() == [0]
    assert spaced_distances(3).tolist() == [0, 1, 2]
    assert spaced_distances(17).tolist() == [0, 1, 2, 3, 4, 6, 8, 11, 16]


@pytest.mark.parametrize(
    ("shapes", "titles"),
    [
        ({}, ["nothing is learned"]),
        ({"frequencies": (4,)}, ["nothing is learned", "frequency, radians per position"]),
        (
            {"delta": (2, 2, 4), "bias": (2, 4, 4), "log_ratio": (2, 4), "frequencies": (2, 4)},
            ["delta", "bias b, radians", "ln of frequency", "frequency, radians per position"],
        ),
        ({"delta": (2, 1), "bias": (2, 1), "frequencies": (4,)}, ["delta", "bias b"]),
        ({"a": (2, 2, 8), "bias": (2, 4, 4)}, ["a (real, then imaginary parts)", "bias b"]),
        (
            {"weights": (2, 4, 2, 4), "bias": (2, 4, 2, 4), "log_ratio": (2, 2, 4)},
            ["weight w of r=0", "weight w of r=1", "bias b, radians of r=1", "ln of frequency"],
        ),
    ],
)
def test_a_panel_for_each_array_and_layer(
    shapes: dict[str, tuple[int, ...]], titles: list[str], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    learned = {name: np.abs(rng.standard_normal(shape)) for name, shape in shapes.items()}
    # Letters stay letters.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(learned, BY_DISTANCE, "kind", tmp_path / "figure.svg")
    root = xml.etree.ElementTree.parse(tmp_path / "figure.svg").getroot()
    text = "\n".join(root.itertext())
    for title in [*titles, "layer 0: mean weight", "layer 1: mean weight"]:
        assert title in text
    assert "layer 2" not in text
    assert ("nothing is learned" in text) == (not shapes.keys() - {"frequencies"})


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="needs matplotlib: install the extra vqcx_jax\\[plot\\]"):
        draw({}, BY_DISTANCE, "kind", tmp_path / "figure.svg")
    assert not (tmp_path / "figure.svg").exists()
