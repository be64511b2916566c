"""Whether tokens have the distribution that they should have been drawn from."""

import numpy as np
import scipy.stats


def assert_drawn_from(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """By a test that a right sampler fails once in 10^4. Rare tokens are taken together."""
    expected = counts.sum() * probabilities
    rare = expected < 10
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    some = expected > 0
    assert not counts[~some].any()
    # Of a single token there is nothing more to be tested.
    if some.sum() > 1:
        assert scipy.stats.chisquare(counts[some], expected[some]).pvalue > 1e-4
