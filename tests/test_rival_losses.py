"""The losses that PWiseR is compared with, and what holds for PWiseR too; the rest of its tests
are in test_losses.py."""

import math

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from pwiser_tf import losses
from pwiser_tf.losses import CombinedPairLoss, PairwiseLogisticLoss
from tests import oracles

# Each as a function of (logits, grade, group); JRC's energies are made of the logits, so that one
# gradient has both parts.
LOSSES = {
    "pwiser": lambda x, grade, group: losses.pwiser(x, grade),
    "pairwise_logistic": lambda x, grade, group: losses.pairwise_logistic(x, grade),
    "combined_pair": lambda x, grade, group: losses.combined_pair(x, np.asarray(grade) > 0),
    "jrc": lambda x, grade, group: losses.jrc(x, tf.sin(3 * x), np.asarray(grade) > 0, group),
    "listce": lambda x, grade, group: losses.listce(x, np.asarray(grade) > 0, group),
}
ORACLES = {
    "pwiser": lambda x, grade, group: oracles.pwiser(x, grade, 0.05, 0.1)[0],
    "pairwise_logistic": lambda x, grade, group: oracles.pairwise_logistic(x, grade)[0],
    "combined_pair": lambda x, grade, group: oracles.combined_pair(x, grade > 0)[0],
    "jrc": lambda x, grade, group: oracles.jrc(x, np.sin(3 * x), grade > 0, group),
    "listce": lambda x, grade, group: oracles.listce(x, grade > 0, group),
}
LOGISTIC, GROUPWISE = ("pairwise_logistic", "combined_pair"), ("jrc", "listce")
PAIRWISE = ("pwiser", *LOGISTIC)
each_loss = pytest.mark.parametrize("name", LOSSES)


def loss_and_gradient(name, logits, grade, group):
    """(loss, gradient) as float64 NumPy; logits keep their type."""
    logits = tf.convert_to_tensor(logits)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = LOSSES[name](logits, grade, group)
    gradient = tape.gradient(loss, logits)
    assert loss.dtype == gradient.dtype == logits.dtype
    assert loss.shape == ()
    assert gradient.shape == logits.shape
    return tf.cast(loss, tf.float64).numpy(), tf.cast(gradient, tf.float64).numpy()


def random_case(seed, rows=50, shares=(0.6, 0.25, 0.15), groups=12):
    """Logits, float64, grades, and groups named by large numbers of both signs."""
    generator = np.random.default_rng(seed)
    names = generator.integers(-(2**62), 2**62, groups)
    logits = generator.normal(-1, 2, rows)
    return logits, generator.choice(3, rows, p=shares), generator.choice(names, rows)


# --- values --------------------------------------------------------------------------------------


def test_pairwise_logistic_by_arithmetic():
    # Conversion at log 3, clicks at 0 and log 3, exposure at log 9: odds 1/3, 1 and 3.
    logits = np.log([3.0, 1.0, 3.0, 9.0])
    loss = losses.pairwise_logistic(logits, [2, 1, 1, 0]).numpy()
    assert loss == pytest.approx((math.log(4 / 3) + math.log(2)) / 2 + math.log(4), rel=1e-12)


def test_combined_pair_by_arithmetic():
    # Positives at log 3 and 0, negatives at 0 and log 9: odds 1/3, 3, 1 and 9.
    logits = np.log([3.0, 1.0, 1.0, 9.0])
    loss = losses.combined_pair(logits, [1, 1, 0, 0]).numpy()
    expected = (math.log(4 / 3) + math.log(4) + math.log(2) + math.log(10)) / 4
    assert loss == pytest.approx(expected, rel=1e-12)


def test_jrc_by_arithmetic():
    # One group: f0 = log 2, log 1, log 5; f1 = log 6, log 1, log 1. The third row is positive. The
    # other group is one row, whose share of it is 1.
    energy = np.log([2.0, 1.0, 5.0, 7.0])
    logits = np.log([3.0, 1.0, 0.2, 7.0])
    loss = losses.jrc(logits, energy, [0, 0, 1, 1], [4, 4, 4, -1]).numpy()
    expected = -(math.log(2 / 8) + math.log(1 / 8) + math.log(1 / 8) + math.log(1)) / 4
    assert loss == pytest.approx(expected, rel=1e-12)


def test_listce_by_arithmetic():
    # Probabilities .5, .2 and .3 with two positives; .1 and .3 with one; a group without any.
    p = np.array([0.5, 0.2, 0.3, 0.1, 0.3, 0.9])
    loss = losses.listce(np.log(p / (1 - p)), [1, 0, 1, 1, 0, 0], [1, 1, 1, 2, 2, 3]).numpy()
    expected = (-(math.log(0.5) + math.log(0.3)) / 2 - math.log(0.25)) / 2
    assert loss == pytest.approx(expected, rel=1e-12)


@each_loss
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_double_loop(name, seed):
    logits, grade, group = random_case(seed)
    loss, _ = loss_and_gradient(name, logits, grade, group)
    assert loss == pytest.approx(ORACLES[name](logits, grade, group), rel=1e-12)


@each_loss
def test_gradient_equals_finite_differences_of_the_double_loop(name):
    logits, grade, group = random_case(seed=5, rows=30)
    _, gradient = loss_and_gradient(name, logits, grade, group)
    step = 1e-5
    for row in range(len(logits)):
        shift = step * (np.arange(len(logits)) == row)
        above, below = (ORACLES[name](x, grade, group) for x in (logits + shift, logits - shift))
        assert gradient[row] == pytest.approx((above - below) / (2 * step), abs=1e-9)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("name", LOGISTIC)
def test_any_number_of_upper_rows_in_the_blocks(name, rows):
    # Blocks hold 8 rows: less than one, one, one and a bit.
    logits, _, group = random_case(seed=6, rows=rows + 3)
    grade = np.repeat([2, 1, 0], [rows, 2, 1])
    loss, gradient = loss_and_gradient(name, logits, grade, group)
    oracle = {
        "pairwise_logistic": oracles.pairwise_logistic,
        "combined_pair": oracles.combined_pair,
    }
    labels = grade if name == "pairwise_logistic" else grade > 0
    expected, expected_gradient = oracle[name](logits, labels)
    assert loss == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-16)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGISTIC)
def test_32k_rows_equal_every_pair_in_numpy(name):
    logits, grade, group = random_case(7, rows=32_768, shares=(0.96, 0.03, 0.01))
    logits = logits.astype(np.float32)
    loss, gradient = loss_and_gradient(name, logits, grade, group)
    labels = grade if name == "pairwise_logistic" else grade > 0
    oracle = {
        "pairwise_logistic": oracles.pairwise_logistic,
        "combined_pair": oracles.combined_pair,
    }
    expected, expected_gradient = oracle[name](logits, labels, oracles.logistic_pairs_by_rows)
    assert loss == pytest.approx(expected, rel=2e-7)
    largest = np.abs(expected_gradient).max()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-8 * largest)


@pytest.mark.parametrize("name", GROUPWISE)
def test_32k_rows_equal_the_loop_over_groups(name):
    logits, grade, group = random_case(8, rows=32_768, shares=(0.96, 0.03, 0.01), groups=4_000)
    loss, gradient = loss_and_gradient(name, logits.astype(np.float32), grade, group)
    assert loss == pytest.approx(ORACLES[name](logits, grade, group), rel=1e-6)
    _, expected_gradient = loss_and_gradient(name, logits, grade, group)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-9)


def test_the_two_oracles_agree():
    logits, grade, _ = random_case(seed=9)
    loss, gradient = oracles.pairwise_logistic(logits, grade)
    by_rows = oracles.pairwise_logistic(logits, grade, oracles.logistic_pairs_by_rows)
    assert by_rows[0] == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(by_rows[1], gradient, rtol=1e-12, atol=1e-18)


def test_groups_of_one_row_have_no_loss():
    logits, grade, _ = random_case(seed=10)
    for name in GROUPWISE:
        loss, gradient = loss_and_gradient(name, logits, grade, np.arange(len(grade)))
        assert loss == pytest.approx(0, abs=1e-15)
        np.testing.assert_allclose(gradient, 0, atol=1e-15)


# --- pairs that are missing ----------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize(
    "grade",
    [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [0], [1], [2], []],
    ids=["exposures", "clicks", "conversions", "0", "1", "2", "empty"],
)
def test_without_pairs_loss_and_gradient_are_zero(name, grade):
    logits = np.linspace(-1, 1, len(grade))
    group = np.arange(len(grade))
    loss, gradient = loss_and_gradient(name, logits, np.array(grade, np.int64), group)
    assert loss == 0
    np.testing.assert_array_equal(gradient, np.zeros(len(grade)))


def test_a_term_without_pairs_does_not_change_the_other():
    for lower_grade in (0, 1):
        loss = losses.pairwise_logistic(np.array([0.4, 0.4]), [lower_grade, 2]).numpy()
        assert loss == pytest.approx(math.log(2), rel=1e-12)


def test_listce_without_positives_is_zero_even_among_many():
    logits, _, group = random_case(seed=11)
    loss, gradient = loss_and_gradient("listce", logits, np.zeros(50, np.int64), group)
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


# --- hard numbers --------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
def test_extreme_logits_have_finite_gradients(name, dtype, scale):
    logits = np.array([1, -1, 1, -1, 0, 0.5], dtype) * scale
    loss, gradient = loss_and_gradient(name, logits.astype(dtype), [0, 0, 2, 2, 1, 0], [1] * 6)
    assert np.isfinite(loss)
    assert loss > 0
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_far_pairs_cost_their_distance_or_about_zero():
    logits = tf.constant([3e4, -3e4])
    assert float(losses.combined_pair(logits, [0, 1])) == pytest.approx(6e4, rel=1e-6)
    assert float(losses.combined_pair(logits, [1, 0])) == 0
    near = float(losses.combined_pair(tf.constant([20.0, 0.0]), [1, 0]))
    assert near == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)


@each_loss
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grade", [[0, 1, 2, 2, 0, 1], [0, 0, 0, 2, 0, 0], [2] * 6, [0] * 6])
@pytest.mark.parametrize("row", range(6))
def test_one_logit_that_is_not_finite_makes_the_loss_nan(name, row, grade, value):
    logits = np.linspace(-1, 1, 6)
    logits[row] = value
    assert np.isnan(LOSSES[name](tf.constant(logits), grade, [5, 5, 5, 6, 6, 6]).numpy())


@each_loss
@pytest.mark.parametrize(("dtype", "tolerance"), [(tf.float16, 2e-3), (tf.bfloat16, 1e-2)])
def test_half_precision_logits(name, dtype, tolerance):
    logits, grade, group = random_case(seed=12)
    logits = tf.cast(logits, dtype)
    loss, _ = loss_and_gradient(name, logits, grade, group)
    exact = tf.cast(logits, tf.float64).numpy()
    if name == "jrc":  # its energies are made in half precision too
        energy = tf.cast(tf.sin(3 * logits), tf.float64).numpy()
        expected = oracles.jrc(exact, energy, grade > 0, group)
    else:
        expected = ORACLES[name](exact, grade, group)
    assert loss == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", LOGISTIC)
def test_a_loss_scale_keeps_gradients_below_half_precision(name):
    # A row's gradient is 1e-8 times 1/2: below float16, 1024 times as much is not.
    rows = 50_000
    logits = tf.zeros([rows], tf.float16)
    grade = np.repeat([0, 2], [rows - 10, 10])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        scaled = LOSSES[name](logits, grade, None) * 1024
    expected = 1024 * 0.5 / (rows - 10)
    assert float(tape.gradient(scaled, logits)[0]) == pytest.approx(expected, rel=0.01)


# --- invariance ----------------------------------------------------------------------------------


@each_loss
def test_the_order_of_the_rows_does_not_matter(name):
    logits, grade, group = random_case(13, rows=300)
    loss, gradient = loss_and_gradient(name, logits, grade, group)
    order = np.random.default_rng(0).permutation(300)
    permuted_loss, permuted = loss_and_gradient(name, logits[order], grade[order], group[order])
    assert permuted_loss == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(permuted, gradient[order], rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("name", PAIRWISE)
def test_only_differences_of_logits_matter(name):
    logits, grade, group = random_case(14, rows=300)
    loss, gradient = loss_and_gradient(name, logits, grade, group)
    shifted_loss, shifted_gradient = loss_and_gradient(name, logits + 3, grade, group)
    assert shifted_loss == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(shifted_gradient, gradient, rtol=1e-9, atol=1e-15)
    # The gradients of all rows sum to 0.
    assert abs(gradient.sum()) < 1e-14


def test_jrc_a_shift_of_a_groups_energies_changes_nothing():
    logits, grade, group = random_case(15)
    energy = np.sin(logits)
    loss = losses.jrc(logits, energy, grade > 0, group).numpy()
    shifted = losses.jrc(logits, energy + 5 * (group == group[0]), grade > 0, group).numpy()
    assert shifted == pytest.approx(loss, rel=1e-12)
    # A shift of a group's logits changes nothing either, because a softmax cancels it.
    shifted = losses.jrc(logits + 5 * (group == group[0]), energy, grade > 0, group).numpy()
    assert shifted == pytest.approx(loss, rel=1e-12)


def test_listce_is_minimal_where_probabilities_are_proportional_to_labels():
    # Its difference to a softmax of logits: calibrated probabilities of soft truth are its minimum,
    # so on the average over labels drawn with p the gradient is 0 at p.
    generator = np.random.default_rng(16)
    p = np.array([0.5, 0.3, 0.2])
    logits = np.tile(np.log(p / (1 - p)), 20_000)
    labels = np.zeros((20_000, 3), np.int64)
    labels[np.arange(20_000), generator.choice(3, 20_000, p=p)] = 1
    group = np.repeat(np.arange(20_000), 3)
    _, gradient = loss_and_gradient("listce", logits, labels.ravel(), group)
    np.testing.assert_allclose(gradient.reshape(-1, 3).sum(axis=0), 0, atol=0.01)


@each_loss
def test_group_names_do_not_matter(name):
    logits, grade, group = random_case(17)
    loss, _ = loss_and_gradient(name, logits, grade, group)
    _, renamed = np.unique(group, return_inverse=True)
    for dtype in (np.int64, np.int32):
        again, _ = loss_and_gradient(name, logits, grade, renamed.astype(dtype))
        assert again == pytest.approx(loss, rel=1e-12)


@each_loss
def test_repetitions_agree_bit_by_bit(name):
    logits, grade, group = random_case(18, rows=32_768, shares=(0.98, 0.015, 0.005), groups=4_000)
    logits = logits.astype(np.float32)
    results = [loss_and_gradient(name, logits, grade, group) for _ in range(5)]
    assert len({loss.tobytes() + gradient.tobytes() for loss, gradient in results}) == 1


# --- graphs --------------------------------------------------------------------------------------


@each_loss
def test_a_graph_of_unknown_batch_size_traced_once(name):
    traces = []
    functions = {
        "pwiser": lambda x, grade, group: losses.pwiser(x, grade),
        "pairwise_logistic": lambda x, grade, group: losses.pairwise_logistic(x, grade),
        "combined_pair": lambda x, grade, group: losses.combined_pair(x, grade > 0),
        "jrc": lambda x, grade, group: losses.jrc(x, tf.sin(3 * x), grade > 0, group),
        "listce": lambda x, grade, group: losses.listce(x, grade > 0, group),
    }
    integers = tf.TensorSpec([None], tf.int64)

    @tf.function(input_signature=[tf.TensorSpec([None]), integers, integers])
    def step(logits, grade, group):
        traces.append(1)
        loss = functions[name](logits, grade, group)
        return loss, tf.gradients(loss, logits)[0]

    for rows in (40, 0, 1, 7):
        logits, grade, group = random_case(19, rows=rows)
        loss, gradient = step(logits.astype(np.float32), grade, group)
        expected, expected_gradient = loss_and_gradient(name, logits, grade, group)
        assert loss.numpy() == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-4, atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_variable_under_a_tape(name):
    # The tape of a variable asks every function inside for its gradient.
    logits, grade, group = random_case(20)
    variable = tf.Variable(logits)
    with tf.GradientTape() as tape:
        loss = LOSSES[name](variable, grade, group)
    _, expected = loss_and_gradient(name, logits, grade, group)
    np.testing.assert_array_equal(tape.gradient(loss, variable), expected)


@pytest.mark.parametrize("name", PAIRWISE)
def test_second_derivatives_are_refused(name):
    logits = tf.constant([0.1, 0.2, 0.3])
    with tf.GradientTape() as outer:
        outer.watch(logits)
        with tf.GradientTape() as inner:
            inner.watch(logits)
            loss = LOSSES[name](logits, [0, 1, 2], None)
        gradient = inner.gradient(loss, logits)
    with pytest.raises(LookupError, match="no second derivatives"):
        outer.gradient(gradient, logits)


# --- what is accepted ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.float32, np.float16, np.bool_])
@pytest.mark.parametrize("column", [False, True])
def test_columns_and_labels_of_any_type(column, dtype):
    logits, grade, group = random_case(seed=21)
    shape = (50, 1) if column else (50,)
    x, energy, groups = logits.reshape(shape), np.sin(3 * logits).reshape(shape), group[:, None]
    labels = (grade > 0).astype(dtype)
    found = [
        losses.combined_pair(x, labels).numpy(),
        losses.jrc(x, energy, labels, groups).numpy(),
        losses.listce(x, labels, groups).numpy(),
        losses.focal(x, labels).numpy().mean(),
    ]
    expected = [ORACLES[name](logits, grade, group) for name in ("combined_pair", *GROUPWISE)]
    np.testing.assert_allclose(found[:3], expected, rtol=1e-12)
    assert found[3] == losses.focal(logits, grade > 0).numpy().mean()


FUNCTIONS = {
    "pairwise_logistic": losses.pairwise_logistic,
    "combined_pair": losses.combined_pair,
    "jrc": lambda x, labels: losses.jrc(x, [0.1, 0.2, 0.3], labels, [1, 1, 2]),
    "listce": lambda x, labels: losses.listce(x, labels, [1, 1, 2]),
    "focal": losses.focal,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_wrong_inputs_are_refused(function):
    with pytest.raises(TypeError, match="logits: found int32, expected a floating-point type"):
        function([0, 1, 1], [0, 1, 0])
    with pytest.raises(ValueError, match=r"logits: found shape \(3, 2\), expected \[batch\]"):
        function(np.zeros((3, 2)), [0, 1, 0])
    with pytest.raises(
        ValueError, match=r"found shape \(1,\), expected \(3,\), the shape of the scores"
    ):
        function(np.float32([0.1, 0.2, 0.3]), [1])


@pytest.mark.parametrize("label", [-1, 2])
@pytest.mark.parametrize("name", ["combined_pair", "jrc", "listce", "focal"])
def test_an_unknown_label_is_refused(name, label):
    with pytest.raises(tf.errors.InvalidArgumentError):
        FUNCTIONS[name](np.float32([0.1, 0.2, 0.3]), [0, 1, label])


def test_energy_and_group_must_have_the_size_of_the_logits():
    logits = np.float32([0.1, 0.2])
    with pytest.raises(ValueError, match=r"energy: found shape \(1,\), expected \(2,\)"):
        losses.jrc(logits, np.float32([0.1]), [0, 1], [1, 1])
    for group_loss in (
        lambda group: losses.jrc(logits, logits, [0, 1], group),
        lambda group: losses.listce(logits, [0, 1], group),
    ):
        with pytest.raises(ValueError, match=r"group: found shape \(3,\), expected \(2,\)"):
            group_loss([1, 1, 1])


# --- focal ---------------------------------------------------------------------------------------


def test_focal_by_arithmetic():
    p = np.array([0.9, 0.2, 0.3])
    found = losses.focal(np.log(p / (1 - p)), [1, 1, 0], gamma=2).numpy()
    expected = [-(0.1**2) * math.log(0.9), -(0.8**2) * math.log(0.2), -(0.3**2) * math.log(0.7)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_equals_keras_where_keras_does_not_clip(gamma):
    logits, grade, _ = random_case(22)
    keras_loss = keras.losses.BinaryFocalCrossentropy(
        gamma=gamma, from_logits=True, reduction="none"
    )
    expected = keras_loss((grade > 0).astype(np.float64)[:, None], logits[:, None]).numpy()
    np.testing.assert_allclose(losses.focal(logits, grade > 0, gamma), expected, rtol=1e-5)


def test_focal_with_gamma_zero_is_cross_entropy():
    logits, grade, _ = random_case(23)
    labels = (grade > 0).astype(np.float64)
    expected = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
    np.testing.assert_allclose(losses.focal(logits, labels, 0.0), expected, rtol=1e-12)


def test_focal_at_extreme_logits():
    logits = tf.constant([1e4, 1e4, -1e4, -1e4, 80.0, -80.0])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = losses.focal(logits, [1, 0, 1, 0, 0, 1])
    np.testing.assert_allclose(loss, [0, 1e4, 1e4, 0, 80, 80], rtol=1e-6)
    np.testing.assert_allclose(tape.gradient(loss, logits), [0, 1, -1, 0, 1, -1], atol=1e-6)


def test_focal_gradient_equals_finite_differences():
    logits, grade, _ = random_case(24)
    with tf.GradientTape() as tape:
        x = tf.constant(logits)
        tape.watch(x)
        loss = tf.reduce_sum(losses.focal(x, grade > 0, 1.7))
    above, below = (losses.focal(logits + step, grade > 0, 1.7) for step in (1e-6, -1e-6))
    np.testing.assert_allclose(tape.gradient(loss, x), (above - below) / 2e-6, rtol=1e-6, atol=1e-8)


def test_focal_keeps_nan():
    assert np.isnan(losses.focal([math.nan, 1.0], [0, 1]).numpy()).tolist() == [True, False]


@pytest.mark.parametrize("gamma", [-1, math.nan, math.inf])
def test_focal_refuses_a_wrong_gamma(gamma):
    with pytest.raises(ValueError, match="gamma: found"):
        losses.focal([0.1], [1], gamma)


# --- Keras ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["auto", "none", "sum", "sum_over_batch_size"])
def test_keras_losses_give_the_function_value_and_can_be_serialised(reduction):
    logits, grade, _ = random_case(seed=25)
    for make, y_true, expected in (
        (PairwiseLogisticLoss, grade, oracles.pairwise_logistic(logits, grade)[0]),
        (CombinedPairLoss, grade > 0, oracles.combined_pair(logits, grade > 0)[0]),
    ):
        loss = make(reduction=reduction)
        assert loss(y_true, logits).numpy() == pytest.approx(expected, rel=1e-12)
        again = keras.losses.deserialize(keras.losses.serialize(loss))
        assert type(again) is make
        assert again.get_config() == loss.get_config()
        with pytest.raises(ValueError, match=f"{make.__name__} takes no sample_weight"):
            loss(y_true, logits, sample_weight=[1.0])


@pytest.mark.parametrize("make", [PairwiseLogisticLoss, CombinedPairLoss])
def test_keras_fit(make):
    features = np.random.default_rng(26).normal(size=(512, 4)).astype(np.float32)
    grade = (features[:, 0] > 0.5).astype(np.int64) + (features[:, 0] > 1.3)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Dense(1, input_shape=(4,))])
    model.compile(keras.optimizers.Adam(0.05), make())
    labels = grade if make is PairwiseLogisticLoss else grade > 0
    history = model.fit(features, labels, batch_size=120, epochs=8, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]
