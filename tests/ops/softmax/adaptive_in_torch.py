"""What torch.nn.AdaptiveLogSoftmaxWithLoss makes of the cases of test_adaptive.py.

The tests read it from a file, as torch is not among their dependencies. Where torch and they are
installed, `PYTHONPATH=.:tests python tests/ops/softmax/adaptive_in_torch.py` writes it anew.
"""

from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_suffix(".npz")


def results(
    hidden: np.ndarray,
    weights: dict[str, np.ndarray],
    ranks: np.ndarray,
    coefficients: np.ndarray,
    cutoffs: tuple[int, ...],
    div_value: float,
) -> dict[str, np.ndarray]:
    """Losses, log-probabilities, and gradients of the sum of coefficients * losses.

    Args:
        weights: by torch's names.
    """
    import torch

    (_, dim), vocab_size, has_bias = hidden.shape, len(ranks), "head.bias" in weights
    options: dict[str, Any] = {"div_value": div_value, "head_bias": has_bias}
    layer = torch.nn.AdaptiveLogSoftmaxWithLoss(dim, vocab_size, list(cutoffs), **options)
    parameters = dict(layer.named_parameters())
    assert {n: tuple(p.shape) for n, p in parameters.items()} == {
        n: w.shape for n, w in weights.items()
    }
    with torch.no_grad():
        for name, array in weights.items():
            parameters[name].copy_(torch.from_numpy(array))
    h = torch.from_numpy(hidden).requires_grad_()
    output = layer(h, torch.from_numpy(ranks.astype(np.int64))).output
    (-output @ torch.from_numpy(coefficients)).backward()
    found = {"nll": -output, "log_probs": layer.log_prob(h), "hidden": h.grad}
    found |= {name: parameter.grad for name, parameter in parameters.items()}
    return {name: x.detach().numpy() for name, x in found.items()}


def main() -> None:
    import test_adaptive

    of_cases = {name: results(*test_adaptive.for_torch(name)) for name in test_adaptive.CASES}
    arrays = {f"{name}/{n}": x for name, found in of_cases.items() for n, x in found.items()}
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
