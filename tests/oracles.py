"""Slow, obvious reference implementations that the tests compare the real ones with."""

import math

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


def logistic_pairs(logits, upper, lower):
    """(mean over pairs of log(1 + exp(lower's logit - upper's)), gradient), pair by pair."""
    loss, gradient = 0.0, [0.0] * len(logits)
    pairs = len(upper) * len(lower)
    for j in upper:
        for i in lower:
            difference = logits[i] - logits[j]
            loss += math.log1p(math.exp(difference)) / pairs
            gradient[i] += 1 / (1 + math.exp(-difference)) / pairs
            gradient[j] -= 1 / (1 + math.exp(-difference)) / pairs
    return loss, gradient


def logistic_pairs_by_rows(logits, upper, lower):
    """`logistic_pairs` in float64 NumPy, one upper row against all lower ones at a time."""
    logits = np.asarray(logits, np.float64)
    loss, gradient = 0.0, np.zeros(len(logits))
    for j in upper:
        difference = logits[lower] - logits[j]
        slope = 1 / (1 + np.exp(-difference)) / (len(upper) * len(lower))
        loss += np.mean(np.logaddexp(0, difference)) / len(upper)
        gradient[lower] += slope
        gradient[j] -= np.sum(slope)
    return loss, gradient


def pairwise_logistic(logits, grades, pairs=logistic_pairs):
    """(RankNet on PWiseR's pairs, its gradient)."""
    rows = [[row for row, grade in enumerate(grades) if grade == level] for level in (0, 1, 2)]
    terms = [pairs(logits, rows[2], rows[level]) for level in (0, 1)]
    return sum(loss for loss, _ in terms), np.sum([gradient for _, gradient in terms], axis=0)


def combined_pair(logits, labels, pairs=logistic_pairs):
    """(the ranking term of Combined-Pair, its gradient)."""
    positives = [row for row, label in enumerate(labels) if label]
    negatives = [row for row, label in enumerate(labels) if not label]
    return pairs(logits, positives, negatives)


def _rows_of_groups(groups):
    rows = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return rows


def jrc(logits, energies, labels, groups):
    """The ranking term of JRC, row by row."""
    loss = 0.0
    for rows in _rows_of_groups(groups).values():
        for i in rows:
            f = [energies[j] + logits[j] if labels[i] else energies[j] for j in rows]
            own = energies[i] + logits[i] if labels[i] else energies[i]
            loss -= math.log(math.exp(own) / sum(math.exp(value) for value in f)) / len(logits)
    return loss


def listce(logits, labels, groups):
    """ListCE with the sigmoid, group by group, mean over the groups with a positive."""
    losses = []
    for rows in _rows_of_groups(groups).values():
        p = {row: 1 / (1 + math.exp(-logits[row])) for row in rows}
        positives = [row for row in rows if labels[row]]
        if positives:
            costs = [-math.log(p[row] / sum(p.values())) for row in positives]
            losses.append(sum(costs) / len(positives))
    return sum(losses) / len(losses) if losses else 0.0
