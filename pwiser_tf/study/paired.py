"""Statistics of two ways of training, A less B, that share their seeds and their test rows.

Such a difference is uncertain for two reasons. Each seed trains other weights: the t-test over
seeds covers that. And all seeds are evaluated on the same test rows, which are a sample too:
DeLong's test covers that. Neither covers the other, so the p-value of a comparison is the larger of
the two (an intersection-union test: it rejects only where both do), and Holm's method then corrects
for the number of comparisons.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from pwiser_tf import metrics

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean difference, its 95 percent interval and the two-sided p-value of no difference.

    What the data do not define (an interval from one seed) is None.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None


def over_seeds(differences: Sequence[float]) -> Estimate:
    """The paired t-test: the mean of one difference a seed, [seeds] of at least 1.

    The interval is of the mean over all possible seeds, on this one test split. The interval of
    equal differences is a point, and their p is 1 where they are 0, otherwise 0.
    """
    differences = np.asarray(differences, np.float64)
    mean = float(differences.mean())
    if len(differences) < 2:
        return Estimate(mean, None, None, None)
    if not np.ptp(differences):
        return Estimate(mean, mean, mean, 0.0 if mean else 1.0)
    found = stats.ttest_1samp(differences, 0)
    low, high = map(float, found.confidence_interval(LEVEL))
    return Estimate(mean, low, high, float(found.pvalue))


def wilcoxon(differences: Sequence[float]) -> float | None:
    """The two-sided p-value of Wilcoxon's signed-rank test; None below 2 seeds.

    It assumes less than the t-test and has less power: with 5 seeds it is never below 0.0625.
    """
    differences = np.asarray(differences, np.float64)
    if len(differences) < 2:
        return None
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)


def over_rows(a: Sequence[tuple], b: Sequence[tuple]) -> Estimate:
    """DeLong's paired test of the AUC difference A less B, averaged over the seeds.

    The placements are averaged over seeds row by row, before their variance is taken, so that
    what the seeds' models have in common (the same rows, much the same ranking) is in it. The
    interval covers the mean difference of these very models on other test rows. With one seed it
    is `pwiser_tf.metrics.auc_difference`.

    Args:
      a, b: `pwiser_tf.metrics.placements` of each seed, of the same rows throughout.
    """
    by_positive, by_negative = (
        np.mean([x[side] - y[side] for x, y in zip(a, b, strict=True)], axis=0) for side in (0, 1)
    )
    found = metrics.difference_of_placements(by_positive, by_negative, LEVEL)
    return Estimate(*(None if math.isnan(value) else value for value in found))


def both(*p_values: float | None) -> float | None:
    """The p-value of "every one of these tests rejects": the largest; None where one is."""
    return None if None in p_values else max(p_values)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment: reject those at most 0.05, and the chance that any of the
    rejections is wrong is at most 0.05, however the tests depend on each other.

    Args:
      p_values: of one family of comparisons; None is no comparison, and stays None.
    """
    known = sorted(p for p in p_values if p is not None)
    multiplied = [p * (len(known) - rank) for rank, p in enumerate(known)]
    adjusted = np.minimum(1.0, np.maximum.accumulate(multiplied)).tolist()
    by_value = dict(zip(known, adjusted, strict=True))
    return [None if p is None else by_value[p] for p in p_values]


def verdict(gain: float, p_value: float | None) -> str | None:
    """ "win" or "loss" where the p-value is at most 0.05, else "tie"; None where there is none."""
    if p_value is None:
        return None
    if p_value > 1 - LEVEL + 1e-12 or not gain:
        return "tie"
    return "win" if gain > 0 else "loss"
