import json
import math

import numpy as np
import pytest
import sklearn.metrics

from pwiser_tf import metrics
from tests import oracles


def random_case(seed, rows=60, rate=0.3, levels=None):
    """Correlated labels and scores; few score levels make many ties."""
    generator = np.random.default_rng(seed)
    labels = (generator.random(rows) < rate).astype(np.int64)
    scores = 1 / (1 + np.exp(1.5 - labels - generator.normal(size=rows)))
    if levels:
        scores = np.round(scores * levels) / levels
    return labels, scores


# --- auc ---------------------------------------------------------------------------------------


def test_auc_counts_the_pairs_in_the_right_order():
    # Positives .8 and .4 against negatives .6 and .2: three of four pairs are right.
    assert metrics.auc([1, 0, 1, 0], [0.8, 0.6, 0.4, 0.2]) == 0.75


def test_auc_counts_a_tie_as_one_half():
    # .5 is above .1 and ties with .5: 1.5 of 2.
    assert metrics.auc([1, 0, 0], [0.5, 0.5, 0.1]) == 0.75
    assert metrics.auc([1, 0, 1, 0, 0], [0.3] * 5) == 0.5


@pytest.mark.parametrize("levels", [None, 20, 3])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.95])
def test_auc_agrees_with_the_double_loop_and_with_sklearn(levels, rate):
    for seed in range(5):
        labels, scores = random_case(seed, rate=rate, levels=levels)
        labels[:2] = [0, 1]
        found = metrics.auc(labels, scores)
        assert found == pytest.approx(oracles.auc(labels, scores), abs=1e-14)
        assert found == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-14)


def test_auc_is_nan_without_one_of_the_classes():
    assert math.isnan(metrics.auc([], []))
    assert math.isnan(metrics.auc([0, 0], [0.1, 0.2]))
    assert math.isnan(metrics.auc([1, 1], [0.1, 0.2]))


def test_auc_does_not_depend_on_the_order_of_rows_or_a_rising_transformation():
    labels, scores = random_case(7, rows=200, levels=30)
    area = metrics.auc(labels, scores)
    order = np.random.default_rng(0).permutation(len(labels))
    assert metrics.auc(labels[order], scores[order]) == area
    assert metrics.auc(labels, np.exp(5 * scores) - 3) == area
    # A falling transformation reverses every pair.
    assert metrics.auc(labels, -scores) == pytest.approx(1 - area, abs=1e-15)


def test_auc_orders_scores_that_differ_in_the_last_bit():
    # Predictions at rare conversions cluster: a threshold grid or a cast would call these equal.
    low = np.float32(1e-4)
    high = np.nextafter(low, np.float32(1))
    assert metrics.auc([0, 1], np.array([low, high])) == 1.0
    assert metrics.auc([0, 1], [1e-4, np.nextafter(1e-4, 1)]) == 1.0


def test_auc_takes_booleans_integers_and_infinities():
    assert metrics.auc(np.array([True, False]), np.array([2, 1])) == 1.0
    assert metrics.auc([1.0, 0.0, 0.0], [math.inf, -math.inf, 0.0]) == 1.0


def test_auc_of_more_pairs_than_32_bits_count():
    # 100,000 x 100,000 pairs, each positive between the two halves of the negatives.
    labels = np.repeat([0, 1, 0], [50_000, 100_000, 50_000])
    scores = np.repeat(np.float32([0.1, 0.2, 0.3]), [50_000, 100_000, 50_000])
    assert metrics.auc(labels, scores) == 0.5


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.1], r"one shape \[n\], found \[2\] and \[1\]"),
        ([[0], [1]], [[0.1], [0.2]], r"one shape \[n\], found \[2, 1\]"),
        ([0, 2], [0.1, 0.2], "labels in 0, 1, found 2 at row 1"),
        ([0, math.nan], [0.1, 0.2], "labels in 0, 1, found nan at row 1"),
        ([0, 1, 1], [0.1, math.nan, 0.2], "scores that are numbers, found nan at row 1"),
    ],
)
def test_wrong_arrays_are_refused(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        metrics.auc(labels, scores)


# --- intervals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 5])
def test_auc_interval_is_delong_in_wilsons_formula(levels):
    for seed in range(5):
        labels, scores = random_case(seed, rows=600, levels=levels)
        area, low, high = metrics.auc_interval(labels, scores)
        assert area == metrics.auc(labels, scores)
        variance = oracles.delong_covariance(labels, scores, scores)
        for end in (low, high):
            # Wilson: the AUC is 1.96 errors from each end, by the error that holds at this end.
            error = math.sqrt(variance * end * (1 - end) / (area * (1 - area)))
            # The prior's 4 rows among hundreds widen the interval a little.
            assert 1 < abs(end - area) / (1.959964 * error) < 1.05


def test_auc_interval_by_hand():
    # Each of 5 positives beats 3 of 5 negatives, and is beaten by 2: the AUC is .6. A negative is
    # beaten by all or none of the positives, which is a variance of .24, the largest there is.
    # Shares of the largest variance: (5 * 0 + 4) / (6 * 5) and (5 * 1 + 4) / (6 * 5), in all 13/30.
    labels, scores = np.repeat([0, 1, 0], [3, 5, 2]), np.repeat([0.1, 0.5, 0.9], [3, 5, 2])
    area, low, high = metrics.auc_interval(labels, scores)
    assert area == 0.6
    # Wilson's interval of a share .6 of 30/13 rows, on paper: .6 is z errors from either end.
    for end in (low, high):
        assert (area - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) * 13 / 30, rel=1e-6)
    assert low < area < high


def test_auc_interval_of_separated_classes_ends_at_one():
    # 4/30 and 4/30 of the largest variance: 3.75 rows. Wilson: z^2 / (n + z^2) from the end.
    labels = np.repeat([1, 0], 5)
    reach = 3.841459 / (3.75 + 3.841459)
    found = metrics.auc_interval(labels, np.arange(10)[::-1])
    assert found == pytest.approx((1, 1 - reach, 1), rel=1e-6)
    assert found[2] == 1.0
    assert metrics.auc_interval(labels, np.arange(10)) == pytest.approx((0, 0, reach), rel=1e-6)
    assert metrics.auc_interval(labels, np.arange(10))[1] == 0.0


def test_auc_interval_has_the_width_of_a_bootstrap():
    labels, scores = random_case(3, rows=2000, rate=0.1)
    generator = np.random.default_rng(0)
    drawn = [generator.integers(len(labels), size=len(labels)) for _ in range(1000)]
    areas = [metrics.auc(labels[rows], scores[rows]) for rows in drawn]
    _, low, high = metrics.auc_interval(labels, scores)
    assert low == pytest.approx(np.quantile(areas, 0.025), abs=0.01)
    assert high == pytest.approx(np.quantile(areas, 0.975), abs=0.01)


def normal(generator, positives, negatives, shift):
    """Scores of deviation 1, those of the positives `shift` higher: AUC = Phi(shift / sqrt 2)."""
    scores = generator.normal(size=positives + negatives)
    scores[:positives] += shift
    return scores


def five_levels(generator, positives, negatives, shift):
    """`normal`, cut into five levels at fixed places."""
    return np.digitize(normal(generator, positives, negatives, shift), [-0.8, -0.2, 0.3, 0.9])


def two_levels(generator, positives, negatives, shift):
    """`normal`, cut in two."""
    return normal(generator, positives, negatives, shift) > 0.8


def true_auc(draw, shift):
    """P(a positive scores above a negative), ties one half, from a large sample or the formula."""
    if draw is normal:
        return 0.5 * math.erfc(-shift / 2)
    large = draw(np.random.default_rng(9), 1_000_000, 1_000_000, shift)
    return metrics.auc(np.repeat([1, 0], 1_000_000), large)


@pytest.mark.parametrize("draw", [normal, five_levels, two_levels])
@pytest.mark.parametrize("shift", [0, 0.7, 1.8, 3.3])
def test_auc_interval_has_its_nominal_coverage(draw, shift):
    truth = true_auc(draw, shift)
    generator = np.random.default_rng(1)
    for positives, negatives in [(5, 5), (5, 300), (10, 300), (20, 20), (100, 300)]:
        labels = np.repeat([1, 0], [positives, negatives])
        covered = tried = 0
        for _ in range(500):
            scores = draw(generator, positives, negatives, shift)
            _, low, high = metrics.auc_interval(labels, scores)
            tried += not math.isnan(low)  # Scores that are all in one level have no interval.
            covered += low <= truth <= high
        assert tried > 400
        assert covered / tried >= 0.92, (positives, negatives)


def test_auc_interval_of_five_positives_among_many_covers():
    generator = np.random.default_rng(2)
    labels = np.repeat([1, 0], [5, 100_000])
    covered = 0
    for _ in range(100):
        _, low, high = metrics.auc_interval(labels, normal(generator, 5, 100_000, 3.3))
        covered += low <= true_auc(normal, 3.3) <= high
    assert covered >= 92


def test_auc_interval_is_not_needlessly_wide_with_many_rows():
    truth = true_auc(normal, 1)
    generator = np.random.default_rng(1)
    labels = np.repeat([1, 0], [200, 1000])
    covered = 0
    for _ in range(1000):
        _, low, high = metrics.auc_interval(labels, normal(generator, 200, 1000, 1))
        covered += low <= truth <= high
    assert 0.93 < covered / 1000 < 0.97


def test_auc_interval_widens_with_its_level_and_stays_inside_zero_and_one():
    labels = np.repeat([1, 0], [5, 40])
    scores = np.concatenate([[0.99, 0.98, 0.97, 0.96, 0.4], np.linspace(0, 0.5, 40)])
    area, low, high = metrics.auc_interval(labels, scores)
    _, lower, higher = metrics.auc_interval(labels, scores, level=0.99)
    assert 0 < lower < low < area < high < higher < 1
    # With negated scores the interval is reversed.
    turned = metrics.auc_interval(labels, -scores)
    assert turned == pytest.approx((1 - area, 1 - high, 1 - low), abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_auc_interval_is_nan_if_undefined():
    def case(labels, scores):
        return np.array(metrics.auc_interval(labels, scores))

    np.testing.assert_array_equal(case([0, 0], [0.1, 0.2]), [math.nan] * 3)
    np.testing.assert_array_equal(case([], []), [math.nan] * 3)
    one_positive = case([1, 0, 0, 0], [0.5, 0.1, 0.5, 0.9])
    np.testing.assert_array_equal(one_positive, [0.5, math.nan, math.nan])
    # 4 rows of a class are too few, 5 are enough.
    for label in (0, 1):
        few = np.repeat([label, 1 - label], [4, 50])
        area, *interval = case(few, np.arange(54))
        np.testing.assert_array_equal([area, *interval], [1.0 - label, math.nan, math.nan])
        enough = np.repeat([label, 1 - label], [5, 50])
        assert not np.isnan(case(enough, np.arange(55))).any()


def test_constant_scores_have_no_interval():
    labels = [1, 0] * 20
    for value in (0.2, 0, math.inf):
        found = metrics.auc_interval(labels, [value] * 40)
        np.testing.assert_array_equal(found, [0.5, math.nan, math.nan])
    # One row in another place is enough to define it.
    assert not np.isnan(metrics.auc_interval(labels, [0.3] + [0.2] * 39)).any()


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_outside_zero_and_one_is_refused(level):
    with pytest.raises(ValueError, match="level between 0 and 1"):
        metrics.auc_interval([0, 1], [0.1, 0.2], level=level)


def test_placements_by_double_loop():
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 40)
    scores = random.integers(0, 8, 40).astype(np.float32)
    of_positives, of_negatives = metrics.placements(labels, scores)
    positives, negatives = scores[labels == 1], scores[labels == 0]

    def beats(a, b):
        return 1.0 if a > b else 0.5 if a == b else 0.0

    expected = [np.mean([beats(p, n) for n in negatives]) for p in positives]
    np.testing.assert_allclose(of_positives, expected)
    expected = [np.mean([beats(p, n) for p in positives]) for n in negatives]
    np.testing.assert_allclose(of_negatives, expected)
    assert metrics.placements(np.ones(3), np.arange(3)) is None
    assert metrics.placements(np.zeros(3), np.arange(3)) is None


def test_auc_difference_is_paired_delong():
    for seed in range(5):
        labels, a = random_case(seed, rows=600, levels=20)
        b = a + np.random.default_rng(seed).normal(scale=0.2, size=len(a))
        variance = (
            oracles.delong_covariance(labels, a, a)
            + oracles.delong_covariance(labels, b, b)
            - 2 * oracles.delong_covariance(labels, a, b)
        )
        difference, low, high, p_value = metrics.auc_difference(labels, a, b)
        expected = metrics.auc(labels, a) - metrics.auc(labels, b)
        assert difference == pytest.approx(expected, abs=1e-14)
        # The prior's 4 rows among hundreds add a few percent to the variance.
        error = (high - low) / (2 * 1.959964)
        assert error**2 == pytest.approx(variance, rel=0.05)
        assert (low + high) / 2 == pytest.approx(difference)
        # 5 percent is where the interval touches 0.
        assert (p_value < 0.05) == (low > 0 or high < 0)
        assert p_value == pytest.approx(math.erfc(abs(difference) / error / math.sqrt(2)), rel=1e-6)
        # With the models exchanged, only the sign changes.
        turned = metrics.auc_difference(labels, b, a)
        assert turned == pytest.approx((-difference, -high, -low, p_value), abs=1e-12)


def test_auc_difference_by_hand():
    # One model separates, the other is exactly wrong: every row differs by 1, without a spread.
    # Only the prior remains: 4 / (6 * 5) for each class of 5 rows.
    labels = np.repeat([1, 0], 5)
    difference, low, high, p_value = metrics.auc_difference(
        labels, np.arange(10)[::-1], np.arange(10)
    )
    error = math.sqrt(8 / 30)
    assert difference == 1.0
    reach = 1.959964 * error
    assert (low, high) == pytest.approx((1 - reach, 1 + reach), rel=1e-6)
    assert p_value == pytest.approx(math.erfc(1 / error / math.sqrt(2)))


@pytest.mark.parametrize("positives", [5, 8, 20])
def test_auc_difference_is_seldom_significant_without_a_difference(positives):
    labels = np.repeat([1, 0], [positives, 300])
    generator = np.random.default_rng(positives)
    rows = positives + 300

    def hits_and_misses(hit, false_alarm):
        return generator.random(rows) < np.where(labels == 1, hit, false_alarm)

    # Pairs of equal AUC: independent noise; much the same scores; ROC curves that cross (the AUC
    # of two levels is .5 + (hit - false alarm) / 2), where few positives often all agree.
    def independent():
        return labels + generator.normal(size=rows), labels + generator.normal(size=rows)

    def alike():
        common = labels + generator.normal(size=rows)
        return [common + 0.3 * generator.normal(size=rows) for _ in range(2)]

    def crossing():
        return hits_and_misses(0.95, 0.2), hits_and_misses(0.8, 0.05)

    for draw in (independent, alike, crossing):
        p_values = [metrics.auc_difference(labels, *draw())[3] for _ in range(1000)]
        assert np.mean(np.array(p_values) < 0.05) < 0.07, draw.__name__


def test_a_large_auc_difference_is_significant():
    generator = np.random.default_rng(0)
    labels = np.repeat([1, 0], [50, 1000])
    common = generator.normal(size=1050)
    weak, strong = common + 0.7 * labels, common + 1.5 * labels
    difference, low, _, p_value = metrics.auc_difference(labels, strong, weak)
    assert low > 0.1
    assert p_value < 1e-6
    # The true AUCs are 0.69 and 0.86.
    assert difference == pytest.approx(0.165, abs=0.05)


def test_auc_difference_without_any_difference():
    labels, scores = random_case(0)
    assert metrics.auc_difference(labels, scores, 2 * scores + 1) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.filterwarnings("error")
def test_auc_difference_is_nan_if_undefined():
    nothing = metrics.auc_difference([0, 0], [0.1, 0.2], [0.2, 0.1])
    np.testing.assert_array_equal(nothing, [math.nan] * 4)
    one_positive = metrics.auc_difference([1, 0, 0], [0.9, 0.1, 0.2], [0.15, 0.1, 0.2])
    np.testing.assert_array_equal(one_positive, [0.5, math.nan, math.nan, math.nan])
    for label in (0, 1):
        few = np.repeat([label, 1 - label], [4, 50])
        found = metrics.auc_difference(few, np.arange(54), -np.arange(54))
        np.testing.assert_array_equal(found, [1.0 - 2 * label, math.nan, math.nan, math.nan])


# --- gauc --------------------------------------------------------------------------------------


def test_gauc_weighs_groups_by_their_exposures():
    # Group 5: AUC 1 over 2 rows. Group 9: AUC 1/2 over 3 rows. Group 2 has one class.
    labels = [1, 0, 0, 1, 0, 0]
    scores = [0.9, 0.1, 0.1, 0.2, 0.3, 0.7]
    groups = [5, 5, 9, 9, 9, 2]
    value, used, skipped = metrics.gauc(labels, scores, groups)
    assert value == pytest.approx((2 * 1 + 3 * 0.5) / 5)
    assert (used, skipped) == (2, 1)


@pytest.mark.parametrize("levels", [None, 10, 2])
def test_gauc_agrees_with_the_double_loop(levels):
    for seed in range(8):
        labels, scores = random_case(seed, rows=120, levels=levels)
        groups = np.random.default_rng(seed).integers(-15, 15, size=120) * 10**12
        assert metrics.gauc(labels, scores, groups) == pytest.approx(
            oracles.gauc(labels, scores, groups), abs=1e-12
        )


def test_gauc_of_one_group_is_the_auc():
    labels, scores = random_case(2, rows=100, levels=15)
    value, used, skipped = metrics.gauc(labels, scores, np.full(100, 7))
    assert value == pytest.approx(metrics.auc(labels, scores), abs=1e-15)
    assert (used, skipped) == (1, 0)


def test_gauc_sees_only_the_order_within_groups():
    labels, scores = random_case(4, rows=200, levels=25)
    groups = np.random.default_rng(4).integers(20, size=200)
    found = metrics.gauc(labels, scores, groups)
    order = np.random.default_rng(0).permutation(200)
    assert metrics.gauc(labels[order], scores[order], groups[order]) == found
    assert metrics.gauc(labels, scores, 1000 - groups) == pytest.approx(found)
    assert metrics.gauc(labels, scores, np.array([f"s{g}" for g in groups])) == pytest.approx(found)
    # A shift of whole groups changes the AUC over all rows, and not this.
    shifted = scores + 10.0 * groups
    assert metrics.auc(labels, shifted) != pytest.approx(metrics.auc(labels, scores), abs=0.01)
    assert metrics.gauc(labels, np.exp(scores) + 10.0 * groups, groups) == pytest.approx(found)


def test_gauc_without_a_usable_group():
    np.testing.assert_array_equal(metrics.gauc([], [], []), [math.nan, 0, 0])
    one_class = metrics.gauc([1, 1, 0], [0.1, 0.2, 0.3], [1, 1, 2])
    np.testing.assert_array_equal(one_class, [math.nan, 0, 2])
    no_positive = metrics.gauc([0, 0, 0], [0.1, 0.2, 0.3], [1, 1, 2])
    np.testing.assert_array_equal(no_positive, [math.nan, 0, 2])


def test_gauc_refuses_groups_of_another_length():
    with pytest.raises(ValueError, match=r"groups of shape \[2\], found \[3\]"):
        metrics.gauc([0, 1], [0.1, 0.2], [1, 1, 1])


# --- calibration -------------------------------------------------------------------------------


def test_log_loss_by_hand():
    # -log(1/2) and -log(3/4).
    assert metrics.log_loss([1, 0], [0.5, 0.25]) == pytest.approx(math.log(8 / 3) / 2)


def test_log_loss_agrees_with_sklearn():
    labels, scores = random_case(1, rows=300)
    expected = sklearn.metrics.log_loss(labels, scores)
    assert metrics.log_loss(labels, scores) == pytest.approx(expected, rel=1e-12)


def test_log_loss_keeps_the_digits_of_tiny_probabilities():
    # -log(1 - p) is p for a tiny p; formed as log(1 - p) in float32 it would be 0.
    assert metrics.log_loss([0], np.float32([1e-9])) == pytest.approx(1e-9, rel=1e-6)


def test_log_loss_of_a_certain_mistake_is_large_and_finite():
    assert metrics.log_loss([1, 0], np.float32([0, 1])) == pytest.approx(34.54, abs=0.01)
    assert metrics.log_loss([1, 0], np.float32([1, 0])) == 0.0
    assert math.isnan(metrics.log_loss([], []))


def test_pcoc_is_predicted_over_observed():
    assert metrics.pcoc([1, 0, 0, 1], [0.5, 0.5, 0.5, 1.0]) == 1.25
    assert math.isnan(metrics.pcoc([0, 0], [0.5, 0.5]))
    assert math.isnan(metrics.pcoc([], []))


def test_pcoc_sums_float32_predictions_in_float64():
    # Even NumPy's pairwise sum is off by 1e-7 and more in float32.
    predictions = np.full(3_000_000, np.float32(1e-3))
    labels = np.zeros(3_000_000, bool)
    labels[:3000] = True
    expected = float(np.float32(1e-3)) * 1000
    assert metrics.pcoc(labels, predictions) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "metric", [metrics.log_loss, metrics.pcoc, metrics.expected_calibration_error]
)
@pytest.mark.parametrize("wrong", [-0.1, 1.5, math.nan, math.inf])
def test_probabilities_outside_zero_and_one_are_refused(metric, wrong):
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], found .* at row 1"):
        metric([0, 1], [0.5, wrong])


def test_reliability_cuts_bins_of_equal_counts():
    labels = [0, 0, 0, 1, 0, 1, 1, 1]
    probabilities = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    curve = metrics.reliability(labels, probabilities, bins=4)
    np.testing.assert_array_equal(curve.rows, [2, 2, 2, 2])
    np.testing.assert_allclose(curve.predicted, [0.15, 0.35, 0.55, 0.75])
    np.testing.assert_allclose(curve.observed, [0, 0.5, 0.5, 1])
    # |.15 - 0|, |.35 - .5|, |.55 - .5|, |.75 - 1|, averaged.
    error = metrics.expected_calibration_error(labels, probabilities, bins=4)
    assert error == pytest.approx((0.15 + 0.15 + 0.05 + 0.25) / 4)


def test_reliability_never_splits_equal_predictions():
    # Half of the rows are tied, across what would be the first two cuts of four.
    probabilities = np.array([0.1, 0.2, 0.2, 0.2, 0.2, 0.3, 0.4, 0.5])
    labels = np.array([0, 1, 0, 0, 0, 1, 1, 1])
    curve = metrics.reliability(labels, probabilities, bins=4)
    np.testing.assert_array_equal(curve.rows, [1, 5, 2])
    np.testing.assert_allclose(curve.observed, [0, 2 / 5, 1])
    error = metrics.expected_calibration_error(labels, probabilities, bins=4)
    # 1 row .1 away; 5 rows that predict 1.1 / 5; 2 rows that predict .45.
    assert error == pytest.approx((1 * 0.1 + 5 * (0.4 - 0.22) + 2 * (1 - 0.45)) / 8)
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(8)
        shuffled = metrics.expected_calibration_error(labels[order], probabilities[order], bins=4)
        assert shuffled == pytest.approx(error, abs=1e-15)


def test_constant_predictions_make_one_bin():
    curve = metrics.reliability([1, 0, 0, 0], [0.5] * 4)
    np.testing.assert_array_equal(curve.rows, [4])
    assert metrics.expected_calibration_error([1, 0, 0, 0], [0.5] * 4) == 0.25


def test_every_row_is_in_a_bin_when_rows_are_fewer_than_bins():
    labels, scores = random_case(5, rows=7)
    assert metrics.reliability(labels, scores, bins=20).rows.tolist() == [1] * 7


def test_calibration_without_rows():
    assert len(metrics.reliability([], []).rows) == 0
    assert math.isnan(metrics.expected_calibration_error([], []))


def test_wilson_interval_by_hand():
    # 1 of 10 at 95 percent: Wilson gives .0179 to .4042 (his formula, on paper).
    curve = metrics.reliability([1] + [0] * 9, [0.1] * 10)
    assert (curve.low[0], curve.high[0]) == pytest.approx((0.01788, 0.40415), abs=1e-5)
    # None of 10: the low end is exactly 0, the high end z^2 / (n + z^2).
    curve = metrics.reliability([0] * 10, [0.1] * 10)
    assert (curve.low[0], curve.high[0]) == pytest.approx((0, 3.84146 / 13.84146), rel=1e-5)


def test_wilson_interval_ends_exactly_at_zero_and_one():
    for level in (0.5, 0.8, 0.9, 0.95, 0.99):
        for rows in range(1, 30):
            assert metrics.reliability([0] * rows, [0.1] * rows, level=level).low[0] == 0.0
            assert metrics.reliability([1] * rows, [0.1] * rows, level=level).high[0] == 1.0


def test_reliability_refuses_no_bins():
    with pytest.raises(ValueError, match="at least 1 bin, found 0"):
        metrics.reliability([0, 1], [0.1, 0.2], bins=0)


# --- roc curve ---------------------------------------------------------------------------------


def test_roc_curve_by_hand():
    # From the highest score down: up, right, up and right together (a tie).
    false_positive_rate, true_positive_rate = metrics.roc_curve([1, 0, 1, 0], [0.9, 0.5, 0.3, 0.3])
    np.testing.assert_allclose(true_positive_rate, [0, 0.5, 0.5, 1, 1])
    np.testing.assert_allclose(false_positive_rate, [0, 0, 0.5, 1, 1])


def test_roc_curve_holds_the_area():
    labels, scores = random_case(6, rows=400, levels=50)
    whole = metrics.roc_curve(labels, scores, points=2000)
    assert sklearn.metrics.auc(*whole) == pytest.approx(metrics.auc(labels, scores), abs=1e-12)
    labels, scores = random_case(6, rows=20_000, rate=0.02)
    thinned = metrics.roc_curve(labels, scores, points=100)
    assert len(thinned[0]) <= 102
    assert sklearn.metrics.auc(*thinned) == pytest.approx(metrics.auc(labels, scores), abs=2e-3)


def test_roc_curve_is_empty_without_one_of_the_classes():
    assert [len(rates) for rates in metrics.roc_curve([0, 0], [0.1, 0.2])] == [0, 0]


# --- tasks and summary -------------------------------------------------------------------------


def test_task_labels_follow_the_grade():
    grade = np.array([0, 1, 2])
    for task, measured, label in [
        ("ctr", [True, True, True], [False, True, True]),
        ("ctcvr", [True, True, True], [False, False, True]),
        ("cvr", [False, True, True], [False, False, True]),
    ]:
        found = metrics.task_labels(grade, task)
        np.testing.assert_array_equal(found[0], measured)
        np.testing.assert_array_equal(found[1], label)


def test_task_labels_refuse_another_task_or_grade():
    with pytest.raises(ValueError, match="ctr, ctcvr, cvr, found 'clicks'"):
        metrics.task_labels(np.array([0]), "clicks")
    with pytest.raises(ValueError, match="grades in 0, 1, 2, found 3"):
        metrics.task_labels(np.array([0, 3]), "ctr")
    with pytest.raises(ValueError, match=r"grades of shape \[n\], found \[1, 1\]"):
        metrics.task_labels(np.array([[0]]), "ctr")


def sample(rows=2000, seed=0):
    """Grades, predictions of all three tasks and groups of ten rows."""
    generator = np.random.default_rng(seed)
    ctr = generator.beta(2, 8, rows)
    cvr = generator.beta(2, 5, rows)
    clicked = generator.random(rows) < ctr
    converted = clicked & (generator.random(rows) < cvr)
    predictions = {"ctr": ctr, "cvr": cvr, "ctcvr": ctr * cvr}
    return clicked.astype(int) + converted, predictions, np.arange(rows) // 10


def test_summary_measures_each_task_on_its_own_rows():
    grade, predictions, group = sample(rows=20_000)
    found = metrics.summary(grade, predictions, group)
    assert list(found) == ["ctr", "ctcvr", "cvr"]
    clicked = grade >= 1
    for task, labels, rows in [
        ("ctr", clicked, slice(None)),
        ("ctcvr", grade == 2, slice(None)),
        ("cvr", (grade == 2)[clicked], clicked),
    ]:
        scores = predictions[task][rows]
        area, low, high = metrics.auc_interval(labels, scores)
        group_area, used, skipped = metrics.gauc(labels, scores, group[rows])
        assert found[task] == {
            "rows": len(labels),
            "positives": labels.sum(),
            "auc": area,
            "auc_low": low,
            "auc_high": high,
            "gauc": group_area,
            "gauc_groups": used,
            "gauc_groups_skipped": skipped,
            "log_loss": metrics.log_loss(labels, scores),
            "pcoc": metrics.pcoc(labels, scores),
            "calibration_error": metrics.expected_calibration_error(labels, scores),
        }
        # The predictions are the true probabilities: calibrated, and better than chance.
        assert found[task]["pcoc"] == pytest.approx(1, abs=0.1)
        assert found[task]["auc_low"] > 0.5


def test_summary_ignores_cvr_where_nobody_clicked():
    grade, predictions, _ = sample()
    changed = {**predictions, "cvr": np.where(grade == 0, math.nan, predictions["cvr"])}
    assert metrics.summary(grade, changed) == metrics.summary(grade, predictions)


def test_summary_without_groups_has_no_gauc():
    grade, predictions, _ = sample(rows=100)
    ctr = metrics.summary(grade, predictions)["ctr"]
    assert (ctr["gauc"], ctr["gauc_groups"], ctr["gauc_groups_skipped"]) == (None, None, None)


@pytest.mark.parametrize("grade", [[], [0, 0, 0], [2, 2], [0, 1, 1], [2]])
def test_summary_is_strict_json_whatever_is_undefined(grade):
    generator = np.random.default_rng(0)
    predictions = {task: generator.random(len(grade), np.float32) for task in metrics.TASKS}
    found = metrics.summary(np.array(grade, int), predictions, np.zeros(len(grade), int))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["ctr"]["rows"] == len(grade)
    assert found["cvr"]["rows"] == sum(g >= 1 for g in grade)
    assert found["ctcvr"]["positives"] == grade.count(2)
    assert found["cvr"]["auc"] is None


def test_summary_names_the_task_of_an_error():
    grade = np.array([0, 1, 2])
    good = {task: np.array([0.1, 0.2, 0.3]) for task in metrics.TASKS}
    for change, message in [
        ({"ctcvr": np.array([0.1, math.nan, 0.3])}, "ctcvr: expected scores that are numbers"),
        ({"cvr": np.array([0.1, 0.2, 1.5])}, r"cvr: expected probabilities in \[0, 1\], found 1.5"),
        ({"cvr": np.array([0.1])}, r"cvr: expected predictions of shape \[3\], found \[1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            metrics.summary(grade, {**good, **change})
    with pytest.raises(ValueError, match="there are none of cvr"):
        metrics.summary(grade, {"ctr": good["ctr"], "ctcvr": good["ctcvr"]})
    with pytest.raises(ValueError, match=r"ctr: expected groups of shape \[3\], found \[2\]"):
        metrics.summary(grade, good, np.array([1, 2]))


def expected_auc_by_pairs(probabilities, scores):
    won = pairs = 0.0
    for i, (p, score) in enumerate(zip(probabilities, scores, strict=True)):
        for j, (q, other) in enumerate(zip(probabilities, scores, strict=True)):
            if i != j:
                pairs += p * (1 - q)
                won += p * (1 - q) * ((score > other) + (score == other) / 2)
    return won / pairs


def test_expected_auc_is_that_of_all_pairs():
    random = np.random.default_rng(4)
    for size in (2, 7, 60):
        for ties in (False, True):
            probabilities = random.random(size) ** 3
            scores = random.normal(size=size) if not ties else random.integers(3, size=size)
            expected = expected_auc_by_pairs(probabilities, scores)
            assert metrics.expected_auc(probabilities, scores) == pytest.approx(expected)


def test_expected_auc_of_certain_labels_is_auc():
    random = np.random.default_rng(5)
    labels, scores = random.integers(2, size=200), random.integers(20, size=200)
    assert metrics.expected_auc(labels, scores) == pytest.approx(metrics.auc(labels, scores))


def test_expected_auc_is_the_mean_over_drawn_labels():
    random = np.random.default_rng(6)
    probabilities = random.random(3000) * 0.2
    scores = probabilities + 0.1 * random.normal(size=3000)
    drawn = [metrics.auc(random.random(3000) < probabilities, scores) for _ in range(100)]
    error = np.std(drawn) / 10
    assert abs(np.mean(drawn) - metrics.expected_auc(probabilities, scores)) < 4 * error


def test_expected_auc_without_pairs_and_of_wrong_arrays():
    for probabilities in ([], [0.0, 0.0], [1.0, 1.0], [0.3]):
        assert math.isnan(metrics.expected_auc(probabilities, np.arange(len(probabilities))))
    for probabilities, scores in (([0.1, 1.2], [1, 2]), ([0.1], [1, 2]), ([0.1, 0.2], [1, np.nan])):
        with pytest.raises(ValueError, match="expected"):
            metrics.expected_auc(probabilities, scores)


def test_top_mean_by_hand():
    groups = ["b", "a", "b", "a", "c"]
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    # a: row 3; b: rows 0 and 2 are tied; c: its only row.
    assert metrics.top_mean(values, [7, 1, 7, 2, -9], groups) == pytest.approx((4 + 2 + 5) / 3)
    assert math.isnan(metrics.top_mean([], [], []))
    with pytest.raises(ValueError, match="expected groups"):
        metrics.top_mean(values, values, ["a"])
    with pytest.raises(ValueError, match="scores that are numbers"):
        metrics.top_mean([1.0], [np.nan], [0])


def test_summary_ignores_other_outputs():
    grade, ctr = np.array([0, 1, 1, 0]), np.array([0.1, 0.4, 0.2, 0.3])
    alone = metrics.summary(grade, {"ctr": ctr})
    assert metrics.summary(grade, {"ctr": ctr, "interest": ctr, "score": 9 * ctr}) == alone
    assert list(alone) == ["ctr"]
