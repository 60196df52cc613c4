"""Intervals and p values of paired differences, and Holm's correction for many of them.

Two arms of a study are compared seed by seed and, where a run has a loss for each window of a text,
window by window. `differences` is a list with an entry per seed, each a list with one per window.
"""

import math
import statistics


def estimate(differences):
    """(mean, standard error, degrees of freedom) of paired differences.

    The variance of the mean is that over seeds plus that over windows. What varies with both is
    counted twice, so the interval errs on the wide side. Degrees of freedom after Satterthwaite.
    One seed leaves the windows alone: the interval then says nothing about another seed.
    """
    by_seed = [statistics.fmean(seed) for seed in differences]
    by_window = [statistics.fmean(window) for window in zip(*differences)]
    parts = [part for part in (by_seed, by_window) if len(part) > 1]
    terms = [statistics.variance(part) / len(part) for part in parts]
    variance = sum(terms)
    if variance == 0:
        return statistics.fmean(by_seed), 0.0, 1
    shares = sum(term**2 / (len(part) - 1) for term, part in zip(terms, parts))
    return statistics.fmean(by_seed), variance**0.5, max(variance**2 / shares, 1)


def interval(differences):
    """(mean, half the width of its 95 % interval) of paired differences."""
    mean, error, freedom = estimate(differences)
    return mean, t_975(freedom) * error


def p_value(differences):
    """Two-sided p that the mean difference is zero."""
    mean, error, freedom = estimate(differences)
    return chance(mean / error, freedom) if error else float(mean == 0)


def chance(t, freedom, steps=1000):
    """Two-sided p of Student's t. In t = sqrt(f) tan(a) its density is that of cos(a)^(f - 1)."""

    def area(a):
        middles = ((i + 0.5) * a / steps for i in range(steps))
        return a / steps * sum(math.cos(middle) ** (freedom - 1) for middle in middles)

    return 1 - area(math.atan(abs(t) / freedom**0.5)) / area(math.pi / 2)


def t_975(freedom):
    """The 97.5 % point of Student's t, by bisection."""
    low, high = 0.0, 13.0
    for _ in range(30):
        middle = (low + high) / 2
        if chance(middle, freedom) > 0.05:
            low = middle
        else:
            high = middle
    return high


def holm(p_values):
    """{name: p} -> {name: p after Holm's correction for as many comparisons}, smallest first."""
    corrected, largest = {}, 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, (len(p_values) - i) * p_values[name])
        corrected[name] = min(1.0, largest)
    return corrected
