"""Exact metrics of ranking and calibration, as pure functions on NumPy arrays.

In all functions labels are [n] in {0, 1}, and scores or probabilities are [n]. A metric that is
undefined for the data (no rows, one class) is NaN, not 0.5. Wrong arrays (unequal shapes, other
labels, NaN scores) raise ValueError. Only the calibration error uses bins, by its definition;
nothing is sampled or approximated. (`keras.metrics.AUC` with 200 thresholds is wrong by more than
0.1 if positives are rare: benchmarks/metrics.py.)

Scores are compared in their own type (float32 has the same order as float64 and sorts faster).
All sums are float64 or exact integers.
"""

import dataclasses
import math
import statistics

import numpy as np

# The tasks of a summary, in the order in which reports show them.
TASKS = ("ctr", "ctcvr", "cvr")

# log_loss clips probabilities to this distance from 0 and 1, so that a row costs at most 34.5.
_LOG_LOSS_MARGIN = 1e-15

# Below this many rows of a class, the spread of an AUC cannot be estimated.
_FEWEST_ROWS = 5

# The weight, in rows, of the prior in `_mean_variance`.
_PRIOR_ROWS = 4


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: P(a positive scores above a negative), ties counting one half.

    The Mann-Whitney statistic, exact: a sort of the negatives and a binary search per positive.

    Args:
      labels: [n] in {0, 1}.
      scores: [n], any real numbers, infinities included; higher means more likely positive.

    Returns:
      The area, or NaN when one class is absent.

    Raises:
      ValueError: shapes differ or are not [n], a label is not 0 or 1, a score is NaN.
    """
    positives, negatives = _by_class(*_checked(labels, scores))
    return _area(_twice_below(negatives, positives), len(negatives))


def expected_auc(probabilities: np.ndarray, scores: np.ndarray) -> float:
    """The AUC of scores against known probabilities instead of drawn labels: no label noise.

    Row i is positive with weight p_i and negative with weight 1 - p_i. A pair of rows (i, j), i
    not j, is a positive and a negative with weight p_i * (1 - p_j); the result is the weighted
    share of pairs in which i scores above j, ties counting one half. If every probability is 0 or
    1 it is `auc`. O(n log n).

    Args:
      probabilities: [n] in [0, 1], of being positive.
      scores: [n], any real numbers; higher means more likely positive.

    Returns:
      The area, or NaN when no pair has a weight.

    Raises:
      ValueError: shapes differ or are not [n], a probability outside [0, 1], a score is NaN.
    """
    probabilities = np.asarray(probabilities, np.float64)
    _, scores = _checked(np.zeros(probabilities.shape), scores)
    _checked(np.zeros(probabilities.shape), probabilities, probability=True)
    distinct, run = np.unique(scores, return_inverse=True)
    positive = np.bincount(run, probabilities, len(distinct))
    negative = np.bincount(run, 1 - probabilities, len(distinct))
    below = np.cumsum(negative) - negative
    # A row is no pair with itself; in the sums it would be a tie.
    own = np.sum(probabilities * (1 - probabilities))
    pairs = positive.sum() * negative.sum() - own
    if not pairs > 0:
        return math.nan
    return float((np.sum(positive * (below + negative / 2)) - own / 2) / pairs)


def auc_interval(
    labels: np.ndarray, scores: np.ndarray, level: float = 0.95
) -> tuple[float, float, float]:
    """AUC with a confidence interval that is valid also for few positives, in O(n log n).

    The variance is that of DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988), computed from
    ranks as in Sun and Xu (IEEE Signal Processing Letters 21, 2014). With few rows or many ties it
    can be too small by chance; it is 0 if the classes are separated. So it is shrunk towards
    AUC * (1 - AUC), the largest variance of one row's placement, with the weight of 4 rows
    (`_mean_variance`). The interval is Wilson's (JASA 22, 1927) for a proportion. Its number of
    rows is the one that gives this variance, the effective sample size of Korn and Graubard
    (Survey Methodology 24, 1998). It is always inside [0, 1], and it ends at 1 exactly when the
    AUC is 1.

    In simulations (normal and tied scores, true AUC from 0.5 to 1, 5 to 1,000 positives and 5 to
    100,000 negatives) 93 percent or more of the 95 percent intervals contain the true AUC. With
    few positives the coverage is close to 99 percent and the interval is wide. With hundreds the
    interval is close to DeLong's. The coverage is lower if a rare kind of positives, which most
    samples do not contain, scores far below all others.

    Rows are assumed to be independent. Rows of one search are not fully independent, so the
    interval is somewhat too narrow if groups are large.

    Args:
      labels: [n] in {0, 1}.
      scores: [n].
      level: the probability that the interval contains the true AUC.

    Returns:
      (auc, low, high). The auc is NaN when one class is absent; low and high are NaN with fewer
      than 5 rows of a class, and when all scores are equal.

    Raises:
      ValueError: as `auc`, and level not between 0 and 1.
    """
    z = _z(level)
    positives, negatives = _by_class(*_checked(labels, scores))
    if not len(positives) or not len(negatives):
        return math.nan, math.nan, math.nan
    # The variance does not depend on the order of rows, and placements of sorted values are fast.
    positives, negatives = np.sort(positives), np.sort(negatives)
    area, of_positives, of_negatives = _placements(positives, negatives)
    constant = min(positives[0], negatives[0]) == max(positives[-1], negatives[-1])
    if constant or min(len(positives), len(negatives)) < _FEWEST_ROWS:
        return area, math.nan, math.nan
    # If the classes are separated, both variances are multiples of it and it cancels: any number.
    largest = area * (1 - area) or 1.0
    variance = _mean_variance(of_positives, largest) + _mean_variance(of_negatives, largest)
    low, high = _wilson(area, largest / variance, z)
    return area, float(low), float(high)


def auc_difference(
    labels: np.ndarray, scores_a: np.ndarray, scores_b: np.ndarray, level: float = 0.95
) -> tuple[float, float, float, float]:
    """The difference of two AUCs on the same rows, auc(a) - auc(b), by DeLong's paired test.

    Two models make similar errors on the same rows, so their difference is more certain than their
    two intervals suggest. The test compares two sets of scores. To compare two ways of training,
    repeat it with several seeds. `difference_of_placements` has the test and its source.

    Args:
      labels: [n] in {0, 1}.
      scores_a, scores_b: [n], of two models.
      level: the probability that the interval contains the true difference.

    Returns:
      (difference, low, high, p_value): auc(a) - auc(b), its interval (symmetric), and the
      two-sided p-value of no difference. NaN where undefined: one class absent (all four), fewer
      than 5 rows of a class (the last three). Scores that order the rows alike give exactly
      (0, 0, 0, 1).

    Raises:
      ValueError: as `auc`, and level not between 0 and 1.
    """
    a, b = placements(labels, scores_a), placements(labels, scores_b)
    if a is None or b is None:
        return math.nan, math.nan, math.nan, math.nan
    return difference_of_placements(a[0] - b[0], a[1] - b[1], level)


def placements(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """DeLong's placements, whose means are the AUC.

    Args:
      labels: [n] in {0, 1}.
      scores: [n].

    Returns:
      (float64 [positives], float64 [negatives]): for each positive the share of negatives that it
      scores above, for each negative the share of positives that score above it, in the order of
      the rows; None where one class is absent.

    Raises:
      ValueError: as `auc`.
    """
    positives, negatives = _by_class(*_checked(labels, scores))
    if not len(positives) or not len(negatives):
        return None
    return _placements(positives, negatives)[1:]


def difference_of_placements(
    by_positive: np.ndarray, by_negative: np.ndarray, level: float = 0.95
) -> tuple[float, float, float, float]:
    """DeLong's paired test of a difference of AUCs, from the placements of the single rows.

    Source: DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988). The variance of the row
    differences includes the covariance of the two models. With few positives that variance is
    often too small: with 5 positives the original test finds a difference (p < 0.05) in up to 30
    percent of the samples without one. So the variance is shrunk towards the absolute difference,
    with the weight of 4 rows (`_mean_variance`). That is the mean square of the row differences if
    each of them is either 0 or 1 in favour of the better model. In simulations of equal AUCs,
    p < 0.05 then occurs in about 5 percent of the samples or less. With 5 to 10 positives it is
    rare, and only large differences are found.

    Args:
      by_positive, by_negative: [positives] and [negatives], at least 1 each: the `placements` by
        model a, less those by model b; each in [-1, 1].
      level: the probability that the interval covers the true difference.

    Returns:
      (difference, low, high, p_value), as in `auc_difference`.

    Raises:
      ValueError: level not between 0 and 1.
    """
    z = _z(level)
    difference = float(by_positive.mean())
    if min(len(by_positive), len(by_negative)) < _FEWEST_ROWS:
        return difference, math.nan, math.nan, math.nan
    largest = abs(difference)
    error = math.sqrt(_mean_variance(by_positive, largest) + _mean_variance(by_negative, largest))
    if error == 0:
        return 0.0, 0.0, 0.0, 1.0
    p_value = math.erfc(abs(difference) / error / math.sqrt(2))
    return difference, difference - z * error, difference + z * error, p_value


def gauc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> tuple[float, int, int]:
    """AUC within each group, averaged over groups with their row counts (exposures) as weights.

    It measures the order of the rows within a search, which is what ranking needs. Source: Zhou et
    al., "Deep Interest Network" (KDD 2018), section 5.3, with searches instead of users. A group
    with one class has no AUC: it is skipped and counted.

    Args:
      labels: [n] in {0, 1}.
      scores: [n].
      groups: [n], integers or strings: the group of each row, in any order.

    Returns:
      (value, groups_used, groups_skipped); the value is NaN when no group has both classes.

    Raises:
      ValueError: as `auc`, and groups not [n].
    """
    positive, scores = _checked(labels, scores)
    groups = np.asarray(groups)
    if groups.shape != positive.shape:
        raise ValueError(
            f"expected groups of shape {list(positive.shape)}, found {list(groups.shape)}"
        )
    group_count = _distinct(groups)
    # Most groups have no positive and so no AUC. Without their rows the sort is much smaller.
    with_positive = np.unique(groups[positive])
    if not len(with_positive):
        return math.nan, 0, group_count
    code = np.searchsorted(with_positive, groups)
    kept = with_positive.take(code, mode="clip") == groups
    positive, scores, code = positive[kept], scores[kept], code[kept]
    order = np.lexsort((scores, code))
    positive, scores, code = positive[order], scores[order], code[order]

    # A positive scores above the negatives of its group before its run of equal scores, and ties
    # with those inside. Twice its wins are the negatives before the start of the run plus those
    # before its end.
    new_group = np.concatenate([[True], code[1:] != code[:-1]])
    new_run = new_group | np.concatenate([[True], scores[1:] != scores[:-1]])
    group_starts, run_starts = np.flatnonzero(new_group), np.flatnonzero(new_run)
    run_ends = np.append(run_starts[1:], len(code))
    negatives_before = np.concatenate([[0], np.cumsum(~positive)])
    position = np.flatnonzero(positive)
    run, group = np.searchsorted(run_starts, position, side="right") - 1, code[position]
    twice_wins = (
        negatives_before[run_starts[run]]
        + negatives_before[run_ends[run]]
        - 2 * negatives_before[group_starts[group]]
    )

    rows = np.bincount(code, minlength=len(with_positive))
    positives = np.bincount(group, minlength=len(with_positive))
    wins = np.bincount(group, weights=twice_wins, minlength=len(with_positive)) / 2
    used = rows > positives
    rows, positives, wins = rows[used], positives[used], wins[used]
    if not len(rows):
        return math.nan, 0, group_count
    areas = wins / (positives * (rows - positives))
    return float(np.sum(areas * rows) / np.sum(rows)), len(rows), group_count - len(rows)


def top_mean(values: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float:
    """The value of the row that the scores rank first in its group, averaged over the groups.

    Rows of a group that share its highest score count equally. Every group has the same weight.

    Args:
      values: [n], any numbers, such as the probability of a purchase.
      scores: [n].
      groups: [n], integers or strings: the group of each row, in any order.

    Returns:
      The mean, or NaN without rows.

    Raises:
      ValueError: shapes differ or are not [n], a score is NaN.
    """
    values, groups = np.asarray(values, np.float64), np.asarray(groups)
    _, scores = _checked(np.zeros(values.shape), scores)
    if groups.shape != values.shape:
        raise ValueError(
            f"expected groups of shape {list(values.shape)}, found {list(groups.shape)}"
        )
    if not len(values):
        return math.nan
    distinct, code = np.unique(groups, return_inverse=True)
    highest = np.full(len(distinct), -np.inf, scores.dtype)
    np.maximum.at(highest, code, scores)
    first = scores == highest[code]
    tied = np.bincount(code[first])
    return float((np.bincount(code[first], values[first]) / tied).mean())


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean binary cross-entropy in nats; NaN without rows.

    Probabilities are first clipped to [1e-15, 1 - 1e-15], so that a wrong probability of 0 or 1
    costs 34.5 instead of infinity.

    Raises:
      ValueError: as `auc`, and a probability outside [0, 1].
    """
    positive, probabilities = _checked(labels, probabilities, probability=True)
    if not len(positive):
        return math.nan
    of_positives, of_negatives = _by_class(positive, probabilities)
    # log1p keeps the precision of small probabilities, which 1 - p would lose.
    loss = -np.log(np.maximum(of_positives, _LOG_LOSS_MARGIN, dtype=np.float64)).sum()
    loss -= np.log1p(-np.minimum(of_negatives, 1 - _LOG_LOSS_MARGIN, dtype=np.float64)).sum()
    return float(loss / len(positive))


def pcoc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Predicted over observed clicks: sum of probabilities / sum of labels. 1 is calibrated, 1.1
    is 10 percent too high; NaN without positives.

    Raises:
      ValueError: as `auc`, and a probability outside [0, 1].
    """
    positive, probabilities = _checked(labels, probabilities, probability=True)
    count = np.count_nonzero(positive)
    return float(probabilities.sum(dtype=np.float64) / count) if count else math.nan


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Predicted and observed rates by bin of the predictions, in rising order.

    Attributes:
      rows: int64 [k], rows of each bin.
      predicted: float64 [k], mean probability.
      observed: float64 [k], share of positives.
      low, high: float64 [k], Wilson's interval of the observed share.
    """

    rows: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray


def reliability(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = 20, level: float = 0.95
) -> Reliability:
    """Predicted against observed rates in bins of (nearly) equal row counts.

    The bins have equal counts, not equal widths: at a base rate of 1 percent nearly all
    predictions would be in the first of 20 equally wide bins. Equal predictions are always in the
    same bin, so the order of the rows does not matter. With many equal predictions there are fewer
    bins than requested.

    Args:
      labels: [n] in {0, 1}.
      probabilities: [n] in [0, 1].
      bins: the largest number of bins.
      level: of the intervals, by Wilson (JASA 22, 1927): valid for small counts and small rates.

    Returns:
      A Reliability of k <= bins bins, none of them empty; k = 0 without rows.

    Raises:
      ValueError: as `auc`; a probability outside [0, 1], bins below 1, level not in (0, 1).
    """
    z = _z(level)
    if bins < 1:
        raise ValueError(f"expected at least 1 bin, found {bins}")
    positive, probabilities = _checked(labels, probabilities, probability=True)
    count = len(positive)
    # A bin starts at each quantile and contains all values equal to it.
    starts = np.unique(np.sort(probabilities)[np.arange(bins) * count // bins if count else []])
    bin_of_row = np.searchsorted(starts, probabilities, side="right") - 1
    rows = np.bincount(bin_of_row, minlength=len(starts))
    predicted = np.bincount(bin_of_row, weights=probabilities, minlength=len(starts)) / rows
    hits = np.bincount(bin_of_row[positive], minlength=len(starts))
    observed = hits / rows
    return Reliability(rows, predicted, observed, *_wilson(observed, rows, z))


def expected_calibration_error(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = 20
) -> float:
    """Mean distance between predicted and observed rate over bins, weighted by rows; 0 is best.

    The bins are those of `reliability`: equal counts, ties together. (Naeini et al., AAAI 2015,
    define the error; equal counts are from Nixon et al., CVPR Workshops 2019.) Random noise makes
    it larger than 0, and more so with fewer rows: compare it only on the same rows.

    Args:
      labels: [n] in {0, 1}.
      probabilities: [n] in [0, 1].
      bins: the largest number of bins.

    Returns:
      The error, in units of probability; NaN without rows.

    Raises:
      ValueError: as `auc`; a probability outside [0, 1], bins below 1.
    """
    curve = reliability(labels, probabilities, bins)
    if not len(curve.rows):
        return math.nan
    return float(np.average(np.abs(curve.predicted - curve.observed), weights=curve.rows))


def roc_curve(
    labels: np.ndarray, scores: np.ndarray, points: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """The ROC curve for a plot: points of the exact curve, at most `points` of them.

    Half of the thresholds are quantiles of the positives' scores and half of the negatives', so
    that both axes are covered evenly.

    Args:
      labels: [n] in {0, 1}.
      scores: [n].
      points: the largest number of points, not counting the two corners; at least 2.

    Returns:
      (false_positive_rate, true_positive_rate): float64 [k] each, rising from (0, 0) to (1, 1);
      both empty when one class is absent.

    Raises:
      ValueError: as `auc`.
    """
    positives, negatives = _by_class(*_checked(labels, scores))
    if not len(positives) or not len(negatives):
        return np.empty(0), np.empty(0)
    positives, negatives = np.sort(positives), np.sort(negatives)
    chosen = [
        values[np.unique(np.linspace(0, len(values) - 1, max(points // 2, 1)).astype(np.int64))]
        for values in (positives, negatives)
    ]
    thresholds = np.unique(np.concatenate(chosen))[::-1]
    rates = [
        np.concatenate([[0.0], 1 - np.searchsorted(values, thresholds) / len(values), [1.0]])
        for values in (negatives, positives)
    ]
    return rates[0], rates[1]


def task_labels(grade: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows on which a task is measured, and its labels.

    Args:
      grade: [n] in {0, 1, 2}: exposure only, click, conversion.
      task: "ctr" (click, all rows), "ctcvr" (conversion, all rows) or "cvr" (conversion, on the
        rows with a click).

    Returns:
      (measured, label): bool [n] each.

    Raises:
      ValueError: another task, grade not [n], a grade that is not 0, 1 or 2.
    """
    if task not in TASKS:
        raise ValueError(f"expected a task among {', '.join(TASKS)}, found {task!r}")
    grade = np.asarray(grade)
    if grade.ndim != 1:
        raise ValueError(f"expected grades of shape [n], found {list(grade.shape)}")
    unknown = ~np.isin(grade, (0, 1, 2))
    if unknown.any():
        raise ValueError(f"expected grades in 0, 1, 2, found {grade[unknown][0]}")
    clicked, converted = grade >= 1, grade == 2
    if task == "cvr":
        return clicked, converted
    return np.ones(len(grade), bool), clicked if task == "ctr" else converted


def summary(
    grade: np.ndarray, predictions: dict[str, np.ndarray], group: np.ndarray | None = None
) -> dict[str, dict]:
    """Every metric of every task, ready for JSON.

    Args:
      grade: integers [n] in {0, 1, 2}.
      predictions: "ctr", "ctcvr" and "cvr", each float [n] in [0, 1]; without the last two for data
        without conversions. Other outputs are ignored.
      group: [n], the group of each row, or None if the data have no groups.

    Returns:
      Task name to a dict of rows, positives, auc, auc_low, auc_high (95 percent), gauc,
      gauc_groups, gauc_groups_skipped, log_loss, pcoc, calibration_error. Undefined values are
      None, because JSON has no NaN. Without groups the three values of gauc are None.

    Raises:
      ValueError: predictions of a task are missing, or wrong arrays as in `auc`; names the task.
    """
    tasks = TASKS if {"ctcvr", "cvr"} & set(predictions) else ("ctr",)
    return {task: _task_summary(grade, predictions, group, task) for task in tasks}


def _task_summary(grade, predictions, group, task: str) -> dict:
    if task not in predictions:
        raise ValueError(f"expected predictions of {', '.join(TASKS)}; there are none of {task}")
    measured, labels = task_labels(grade, task)
    columns = {"predictions": np.asarray(predictions[task])}
    if group is not None:
        columns["groups"] = np.asarray(group)
    for name, values in columns.items():
        if values.shape != labels.shape:
            raise ValueError(
                f"{task}: expected {name} of shape {list(labels.shape)}, found {list(values.shape)}"
            )
    # CVR is measured only on rows with a click; on other rows its prediction may be anything.
    labels, probabilities = labels[measured], columns["predictions"][measured]
    try:
        area, low, high = auc_interval(labels, probabilities)
        group_area, groups, skipped = None, None, None
        if group is not None:
            group_area, groups, skipped = gauc(labels, probabilities, columns["groups"][measured])
        result = {
            "rows": len(labels),
            "positives": int(np.count_nonzero(labels)),
            "auc": area,
            "auc_low": low,
            "auc_high": high,
            "gauc": group_area,
            "gauc_groups": groups,
            "gauc_groups_skipped": skipped,
            "log_loss": log_loss(labels, probabilities),
            "pcoc": pcoc(labels, probabilities),
            "calibration_error": expected_calibration_error(labels, probabilities),
        }
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from None
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in result.items()
    }


def _checked(labels, scores, probability: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool [n] and scores as float32 or float64 [n]; ValueError for wrong arrays."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            "expected labels and scores of one shape [n], "
            f"found {list(labels.shape)} and {list(scores.shape)}"
        )
    positive = labels == 1
    unknown = ~(positive | (labels == 0))
    if unknown.any():
        row = int(np.argmax(unknown))
        raise ValueError(f"expected labels in 0, 1, found {labels[row]} at row {row}")
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float64)
    wrong = ~((scores >= 0) & (scores <= 1)) if probability else np.isnan(scores)
    if wrong.any():
        row = int(np.argmax(wrong))
        expected = "probabilities in [0, 1]" if probability else "scores that are numbers"
        raise ValueError(f"expected {expected}, found {scores[row]} at row {row}")
    return positive, scores


def _by_class(positive, scores) -> tuple[np.ndarray, np.ndarray]:
    """The scores of the positives and of the negatives, each in the order of the rows."""
    return scores[positive], scores[~positive]


def _twice_below(reference, values) -> np.ndarray:
    """For each value: 2 x (entries of reference below it) + (entries equal to it), int64."""
    reference = np.sort(reference)
    # Searching in rising order uses the cache: with the sort it is still 2 to 8 times faster.
    order = np.argsort(values)
    values = values[order]
    found = np.searchsorted(reference, values, "left")
    found += np.searchsorted(reference, values, "right")
    twice_below = np.empty_like(found)
    twice_below[order] = found
    return twice_below


def _area(twice_wins, negatives: int) -> float:
    """AUC from twice the wins of each positive over the negatives, summed as integers."""
    pairs = len(twice_wins) * negatives
    return int(twice_wins.sum()) / (2 * pairs) if pairs else math.nan


def _placements(positives, negatives) -> tuple[float, np.ndarray, np.ndarray]:
    """The AUC, computed from integers, and the `placements` of both classes."""
    twice_wins = _twice_below(negatives, positives)
    twice_losses = _twice_below(positives, negatives)
    return (
        _area(twice_wins, len(negatives)),
        twice_wins / (2 * len(negatives)),
        1 - twice_losses / (2 * len(positives)),
    )


def _mean_variance(values, largest: float) -> float:
    """Estimates the variance of the mean of values with a variance of at most `largest`.

    The variance of the values is estimated as its posterior mean. The prior is `largest` with the
    weight of _PRIOR_ROWS rows (Gelman et al., "Bayesian Data Analysis", 2013, 2.6: a scaled
    inverse chi-square prior).
    """
    count = len(values)
    variance = (count * np.var(values) + _PRIOR_ROWS * largest) / (count + _PRIOR_ROWS - 3)
    return float(variance / count)


def _wilson(share, rows, z: float) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a share of the rows: (low, high), each [k] or a number."""
    center = (share * rows + z**2 / 2) / (rows + z**2)
    reach = z * np.sqrt(share * (1 - share) * rows + z**2 / 4) / (rows + z**2)
    # At shares of 0 and 1 the end is exact, without a rounding error.
    return np.where(share == 0, 0.0, center - reach), np.where(share == 1, 1.0, center + reach)


def _distinct(values) -> int:
    """The number of different values; sorting is faster than the hash table of np.unique."""
    ordered = np.sort(values)
    return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + min(len(ordered), 1)


def _z(level: float) -> float:
    """The standard normal's two-sided quantile: 1.96 at level 0.95."""
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, found {level}")
    return statistics.NormalDist().inv_cdf((1 + level) / 2)
