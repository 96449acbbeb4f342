"""Slow, obvious reference implementations that the tests compare the real ones with."""

import numpy as np


def auc(labels, scores):
    """AUC by definition: every positive against every negative, a tie counting one half."""
    wins = pairs = 0
    for label, score in zip(labels, scores, strict=True):
        for other_label, other_score in zip(labels, scores, strict=True):
            if label == 1 and other_label == 0:
                pairs += 1
                wins += 1.0 if score > other_score else 0.5 if score == other_score else 0.0
    return wins / pairs if pairs else float("nan")


def delong_covariance(labels, scores_a, scores_b):
    """The covariance of two AUCs on the same rows, as DeLong et al. (1988) write it (4 to 6).

    With a = b it is the variance of one AUC.
    """

    def components(scores):
        positives = [s for s, label in zip(scores, labels, strict=True) if label == 1]
        negatives = [s for s, label in zip(scores, labels, strict=True) if label == 0]

        def psi(x, y):
            return 1.0 if x > y else 0.5 if x == y else 0.0

        v10 = [sum(psi(x, y) for y in negatives) / len(negatives) for x in positives]
        v01 = [sum(psi(x, y) for x in positives) / len(positives) for y in negatives]
        return v10, v01

    def covariance(xs, ys):
        mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
        return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / (len(xs) - 1)

    (a10, a01), (b10, b01) = components(scores_a), components(scores_b)
    return covariance(a10, b10) / len(a10) + covariance(a01, b01) / len(a01)


def gauc(labels, scores, groups):
    """(exposure-weighted mean of the groups' AUCs, groups used, groups skipped)."""
    weighted = rows_used = used = skipped = 0
    for group in set(groups):
        rows = [row for row in range(len(labels)) if groups[row] == group]
        area = auc([labels[row] for row in rows], [scores[row] for row in rows])
        if area == area:
            weighted, rows_used, used = weighted + area * len(rows), rows_used + len(rows), used + 1
        else:
            skipped += 1
    return (weighted / rows_used if rows_used else float("nan")), used, skipped


def pwiser(scores, grades, margin_click, margin_nonclick, normalization="pairs"):
    """(PWiseR, its gradient) pair by pair, as the formula is printed, in Python floats."""
    loss, gradient = 0.0, [0.0] * len(scores)
    conversions = [row for row, grade in enumerate(grades) if grade == 2]
    for lower_grade, margin in ((1, margin_click), (0, margin_nonclick)):
        lower = [row for row, grade in enumerate(grades) if grade == lower_grade]
        divisor = len(lower) * (len(conversions) if normalization == "pairs" else 1)
        for i in lower:
            for j in conversions:
                hinge = max(0.0, margin - (scores[j] - scores[i]))
                loss += hinge**2 / divisor
                gradient[i] += 2 * hinge / divisor
                gradient[j] -= 2 * hinge / divisor
    return loss, gradient


def pwiser_by_rows(scores, grades, margin_click, margin_nonclick):
    """`pwiser` ("pairs") in float64 NumPy: every pair, one conversion against all rows at a time.

    For sizes at which the double loop would take minutes.
    """
    scores, grades = np.asarray(scores, np.float64), np.asarray(grades)
    loss, gradient = 0.0, np.zeros(len(scores))
    conversions = np.flatnonzero(grades == 2)
    for lower_grade, margin in ((1, margin_click), (0, margin_nonclick)):
        lower = np.flatnonzero(grades == lower_grade)
        pairs = len(lower) * len(conversions)
        for j in conversions:
            hinge = np.maximum(0.0, margin - (scores[j] - scores[lower])) / pairs
            loss += np.sum(hinge**2) * pairs
            gradient[lower] += 2 * hinge
            gradient[j] -= 2 * np.sum(hinge)
    return loss, gradient
