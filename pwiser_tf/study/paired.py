"""Statistics of two ways of training, A less B, that share their seeds and their test rows.

Two things make such a difference uncertain. Each seed trains other weights: the t-test over seeds
asks whether the difference outlives that. And all seeds are judged on the same test rows, which
are a sample too: DeLong's test asks whether it outlives other rows. Neither sees the other's
noise, so a comparison's p-value is the larger of the two (an intersection-union test: it rejects
only where both do), and Holm's method then pays for the number of comparisons.
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


@dataclasses.dataclass(frozen=True)
class Placements:
    """What DeLong's method needs of one model's scores.

    Attributes:
      of_positives: float64 [positives], the share of negatives that each one scores above.
      of_negatives: float64 [negatives], the share of positives that score above each one.
    """

    of_positives: np.ndarray
    of_negatives: np.ndarray


def over_seeds(differences: Sequence[float]) -> Estimate:
    """The paired t-test: the mean of one difference a seed, [seeds] of at least 1.

    The interval covers the mean over all seeds that could be drawn, on this one test split.
    Differences that are all equal have no spread: their interval is a point, and p is 1 where
    they are 0, else 0.
    """
    differences = np.asarray(differences, np.float64)
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return Estimate(mean, None, None, None)
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    if error == 0:
        return Estimate(mean, mean, mean, 0.0 if mean else 1.0)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    p_value = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    return Estimate(mean, mean - reach, mean + reach, p_value)


def wilcoxon(differences: Sequence[float]) -> float | None:
    """The two-sided p-value of Wilcoxon's signed-rank test; None below 2 seeds.

    It assumes less than the t-test and can say less: with 5 seeds it is never below 0.0625.
    """
    differences = np.asarray(differences, np.float64)
    if len(differences) < 2:
        return None
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences).pvalue)


def placements(labels: np.ndarray, scores: np.ndarray) -> Placements | None:
    """The placements of scores [n] with labels [n] in {0, 1}; None where a class is absent."""
    positive, scores = np.asarray(labels) == 1, np.asarray(scores)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return None
    # A rank among all less the rank in one's own class counts the others below, ties half.
    ranks = stats.rankdata(scores)
    below = ranks[positive] - stats.rankdata(scores[positive])
    above = positives - (ranks[~positive] - stats.rankdata(scores[~positive]))
    return Placements(below / negatives, above / positives)


def over_rows(a: Sequence[Placements], b: Sequence[Placements]) -> Estimate:
    """DeLong's paired test of the AUC difference A less B, averaged over the seeds.

    The placements are averaged over seeds row by row, before their variance is taken, so that
    what the seeds' models have in common (the same rows, much the same ranking) is in it. The
    interval covers the mean difference of these very models on other test rows. With one seed it
    is `pwiser_tf.metrics.auc_difference`.

    Args:
      a, b: one Placements a seed, of the same rows throughout.
    """
    by_positive = _mean_difference([p.of_positives for p in a], [p.of_positives for p in b])
    by_negative = _mean_difference([p.of_negatives for p in a], [p.of_negatives for p in b])
    found = metrics.difference_of_placements(by_positive, by_negative, LEVEL)
    return Estimate(*(None if math.isnan(value) else value for value in found))


def _mean_difference(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    return np.mean([x - y for x, y in zip(a, b, strict=True)], axis=0)


def both(*p_values: float | None) -> float | None:
    """The p-value of "every one of these tests rejects": the largest; None where one is."""
    return None if None in p_values else max(p_values)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment: reject those at most 0.05, and the chance that any of the
    rejections is wrong is at most 0.05, however the tests depend on each other.

    Args:
      p_values: of one family of comparisons; None is no comparison, and stays None.
    """
    order = sorted((p, k) for k, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p_value, position) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_value))
        adjusted[position] = largest
    return adjusted


def verdict(gain: float, p_value: float | None) -> str | None:
    """ "win" or "loss" where the p-value is at most 0.05, else "tie"; None where there is none."""
    if p_value is None:
        return None
    if p_value > 1 - LEVEL + 1e-12 or not gain:
        return "tie"
    return "win" if gain > 0 else "loss"
