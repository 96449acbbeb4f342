import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from pwiser_tf import losses
from pwiser_tf.losses import PWiseRLoss, pwiser, strength
from tests import oracles

ROOT = pathlib.Path(__file__).resolve().parent.parent


def loss_and_gradient(scores, grade, *args, **kwargs):
    """(loss, gradient) as float64 NumPy; scores keep their type."""
    scores = tf.convert_to_tensor(scores)
    with tf.GradientTape() as tape:
        tape.watch(scores)
        loss = pwiser(scores, grade, *args, **kwargs)
    gradient = tape.gradient(loss, scores)
    assert loss.dtype == gradient.dtype == scores.dtype
    assert loss.shape == ()
    assert gradient.shape == scores.shape
    return tf.cast(loss, tf.float64).numpy(), tf.cast(gradient, tf.float64).numpy()


def random_case(seed, rows=60, shares=(0.5, 0.3, 0.2), spread=0.3):
    """Scores, float64, and grades drawn with the given shares of exposures, clicks, conversions."""
    generator = np.random.default_rng(seed)
    return generator.random(rows) * spread, generator.choice(3, rows, p=shares)


# --- values --------------------------------------------------------------------------------------


def test_one_row_of_each_grade():
    # Exposure .3, click .5, conversion .4: hinges .3 - (.4 - .3) and .2 - (.4 - .5).
    loss, gradient = loss_and_gradient(
        np.array([0.3, 0.5, 0.4]), [0, 1, 2], margin_click=0.2, margin_nonclick=0.3
    )
    assert loss == pytest.approx(0.2**2 + 0.3**2, rel=1e-12)
    np.testing.assert_allclose(gradient, [2 * 0.2, 2 * 0.3, -2 * (0.2 + 0.3)], rtol=1e-12)


@pytest.mark.parametrize(("normalization", "divisor"), [("pairs", 6), ("negatives", 3)])
def test_normalization_divides_by_pairs_or_by_lower_rows(normalization, divisor):
    # Three exposures at .5 against two conversions at .5: six hinges of .1.
    loss = pwiser(np.full(5, 0.5), [0, 0, 0, 2, 2], 0.05, 0.1, normalization)
    assert loss.numpy() == pytest.approx(6 * 0.1**2 / divisor, rel=1e-12)


def test_each_term_has_its_own_normalization():
    # One click and four exposures, all at the one conversion's score: both means are one hinge.
    loss = pwiser(np.full(6, 0.2), [1, 0, 0, 0, 0, 2], margin_click=0.3, margin_nonclick=0.1)
    assert loss.numpy() == pytest.approx(0.3**2 + 0.1**2, rel=1e-12)


@pytest.mark.parametrize("normalization", losses.NORMALIZATIONS)
@pytest.mark.parametrize("margins", [(0.05, 0.1), (0.1, 0.05), (0.0, 0.0), (0.0, 0.2), (5.0, 9.0)])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_double_loop(seed, margins, normalization):
    scores, grade = random_case(seed)
    loss, gradient = loss_and_gradient(scores, grade, *margins, normalization)
    expected, expected_gradient = oracles.pwiser(scores, grade, *margins, normalization)
    assert loss == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-15)


def test_gradient_equals_finite_differences():
    scores, grade = random_case(seed=5, rows=30)
    _, gradient = loss_and_gradient(scores, grade)
    step = 1e-6
    for row in range(len(scores)):
        shift = step * (np.arange(len(scores)) == row)
        difference = pwiser(scores + shift, grade) - pwiser(scores - shift, grade)
        assert gradient[row] == pytest.approx(difference.numpy() / (2 * step), abs=1e-7)


def test_131k_rows_equal_every_pair_in_numpy():
    scores, grade = random_case(6, rows=131_072, shares=(0.959, 0.04, 0.001), spread=0.2)
    loss, gradient = loss_and_gradient(scores.astype(np.float32), grade, 0.05, 0.1)
    expected, expected_gradient = oracles.pwiser_by_rows(
        scores.astype(np.float32), grade, 0.05, 0.1
    )
    assert loss == pytest.approx(expected, rel=2e-7)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-7, atol=1e-14)


def test_the_two_oracles_agree():
    scores, grade = random_case(seed=7)
    loss, gradient = oracles.pwiser(scores, grade, 0.05, 0.1)
    loss_by_rows, gradient_by_rows = oracles.pwiser_by_rows(scores, grade, 0.05, 0.1)
    assert loss == pytest.approx(loss_by_rows, rel=1e-12)
    np.testing.assert_allclose(gradient, gradient_by_rows, rtol=1e-12)


def test_no_pair_matrix():
    # 10^10 pairs: a matrix of them would need 40 GB or more. Each pair misses its margin by .1.
    grade = np.repeat([0, 1, 2], [100_000, 100_000, 50_000])
    scores = np.array([0.1, 0.2, 0.3])[grade]
    loss, gradient = loss_and_gradient(scores, grade, margin_click=0.2, margin_nonclick=0.3)
    assert loss == pytest.approx(0.1**2 + 0.1**2, rel=1e-9)
    np.testing.assert_allclose(gradient[[0, -1]], [2 * 0.1 / 1e5, -4 * 0.1 / 5e4], rtol=1e-9)


# --- pairs that are missing ----------------------------------------------------------------------


@pytest.mark.parametrize(("lower_grade", "margin"), [(1, 0.05), (0, 0.1)])
def test_a_term_without_pairs_does_not_change_the_other(lower_grade, margin):
    loss, gradient = loss_and_gradient(np.array([0.4, 0.4]), [lower_grade, 2])
    assert loss == pytest.approx(margin**2, rel=1e-12)
    np.testing.assert_allclose(gradient, [2 * margin, -2 * margin], rtol=1e-12)
    # No conversion, no pair.
    assert pwiser(np.array([0.1, 0.4]), [0, 1]).numpy() == 0


# --- hard numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0.0, 1e-9, -1e-9])
def test_the_gradient_is_continuous_where_a_hinge_closes(distance):
    # .25 is exact in binary: at distance 0 the scores lie exactly the margin apart.
    scores = np.array([0.25 + distance, 0.25 + distance, 0.5])
    loss, gradient = loss_and_gradient(scores, [0, 1, 2], 0.25, 0.25)
    hinge = max(0.0, distance)
    assert loss == pytest.approx(2 * hinge**2, rel=1e-6, abs=0)
    np.testing.assert_allclose(gradient, [2 * hinge, 2 * hinge, -4 * hinge], rtol=1e-6)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_many_equal_scores(levels):
    # Scores on a grid of 1/8 and margins on it too: every pair is tied or at a hinge's corner.
    scores, grade = random_case(seed=8)
    scores = np.floor(scores * levels / 0.3) / 8
    loss, gradient = loss_and_gradient(scores, grade, 0.125, 0.25)
    expected, expected_gradient = oracles.pwiser(scores, grade, 0.125, 0.25)
    assert loss == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_clustered_at_a_base_rate_of_a_thousandth(dtype):
    scores, grade = random_case(9, rows=4000, shares=(0.9, 0.08, 0.02), spread=1e-6)
    scores = (1e-3 + scores).astype(dtype)
    loss, gradient = loss_and_gradient(scores, grade, 0.05, 0.1)
    expected, expected_gradient = oracles.pwiser_by_rows(scores, grade, 0.05, 0.1)
    assert loss == pytest.approx(expected, rel=1e-7)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-7)


def test_scores_clustered_far_from_zero_without_margins():
    # Hinges of 1e-7 between scores of 1: sums about 0 would leave two digits, about a centre ten.
    scores, grade = random_case(10, rows=400, spread=1e-7)
    scores = 1 - scores
    loss, gradient = loss_and_gradient(scores, grade, 0.0, 0.0)
    expected, expected_gradient = oracles.pwiser_by_rows(scores, grade, 0.0, 0.0)
    assert loss == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-18)


def test_probabilities_of_zero_and_one():
    # The worst order: exposure and click at 1, conversion at 0.
    loss, gradient = loss_and_gradient(np.array([1.0, 1.0, 0.0], np.float32), [0, 1, 2], 0.05, 0.1)
    assert loss == pytest.approx(1.1**2 + 1.05**2, rel=1e-6)
    np.testing.assert_allclose(gradient, [2.2, 2.1, -4.3], rtol=1e-6)
    loss, gradient = loss_and_gradient(np.array([0.0, 0.0, 1.0], np.float32), [0, 1, 2], 0.05, 0.1)
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(tf.float16, 1e-3), (tf.bfloat16, 8e-3)])
def test_half_precision_scores(dtype, tolerance):
    scores, grade = random_case(seed=11)
    scores = tf.cast(scores, dtype)
    loss, gradient = loss_and_gradient(scores, grade)
    expected, expected_gradient = oracles.pwiser(
        tf.cast(scores, tf.float64).numpy(), grade, 0.05, 0.1
    )
    assert loss == pytest.approx(expected, rel=tolerance)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=tolerance, atol=1e-6)


def test_a_loss_scale_keeps_gradients_below_half_precision():
    # 2e-5 / 10^4 rows is below float16's smallest number; 1024 times as much is not.
    rows = 10_000
    scores = tf.fill([rows], tf.constant(0.5, tf.float16))
    grade = np.repeat([0, 2], [rows - 10, 10])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(scores)
        loss = pwiser(scores, grade, 0.0, 1e-5)
        scaled = loss * 1024
    assert tape.gradient(loss, scores)[0] == 0
    expected = 1024 * 2 * 1e-5 / (rows - 10)
    assert float(tape.gradient(scaled, scores)[0]) == pytest.approx(expected, rel=0.05)


# --- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scores", "grade"), [([0.1, 0.2, 0.3], [2]), ([0.1], [2, 0, 0])])
def test_a_graph_does_not_broadcast(scores, grade):
    @tf.function(input_signature=[tf.TensorSpec([None]), tf.TensorSpec([None], tf.int64)])
    def loss(scores, grade):
        return pwiser(scores, grade)

    with pytest.raises(tf.errors.InvalidArgumentError, match="as many values as scores"):
        loss(scores, grade)


def test_xla_is_refused():
    with pytest.raises(tf.errors.InvalidArgumentError, match="compile-time constant"):
        tf.function(pwiser, jit_compile=True)(tf.constant([0.1, 0.2]), tf.constant([0, 2]))


# --- what is accepted ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.float32, np.float16])
@pytest.mark.parametrize("scores_shape", [(60,), (60, 1)])
@pytest.mark.parametrize("grade_shape", [(60,), (60, 1)])
def test_columns_and_grades_of_any_type(scores_shape, grade_shape, dtype):
    scores, grade = random_case(seed=16)
    loss, gradient = loss_and_gradient(
        scores.reshape(scores_shape), grade.reshape(grade_shape).astype(dtype)
    )
    expected, expected_gradient = oracles.pwiser(scores, grade, 0.05, 0.1)
    assert loss == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient.ravel(), expected_gradient, rtol=1e-10, atol=1e-15)


def test_a_grade_that_lost_a_bit_as_a_float_is_rounded():
    below_one, below_two = np.nextafter([1, 2], 0, dtype=np.float32)
    loss = pwiser(np.array([0.3, 0.5, 0.4]), [0.0, below_one, below_two], 0.2, 0.3)
    assert loss.numpy() == pytest.approx(0.2**2 + 0.3**2, rel=1e-12)


@pytest.mark.parametrize("shape", [(), (4, 2), (1, 4), (2, 2, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"scores: found shape .* expected \[batch\]"):
        pwiser(np.zeros(shape), [0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"grade: found shape .* expected \[batch\]"):
        pwiser(np.zeros(4), np.zeros(shape, np.int64))


def test_an_unknown_rank_is_refused():
    @tf.function(input_signature=[tf.TensorSpec(None)])
    def loss(scores):
        return pwiser(scores, [0, 2])

    with pytest.raises(ValueError, match="scores: found shape <unknown>"):
        loss([0.1, 0.2])


def test_different_numbers_of_scores_and_grades_are_refused():
    with pytest.raises(ValueError, match=r"grade: found shape \(1,\), expected \(3,\)"):
        pwiser([0.1, 0.2, 0.3], [2])


def test_scores_must_be_floating_point():
    with pytest.raises(TypeError, match="scores: found int32"):
        pwiser([0, 1], [0, 2])


@pytest.mark.parametrize("grade", [-1, 3])
def test_an_unknown_grade_is_refused(grade):
    with pytest.raises(tf.errors.InvalidArgumentError):
        pwiser([0.1, 0.2, 0.3], [0, 2, grade])


@pytest.mark.parametrize("make", [lambda **kw: pwiser([0.1], [0], **kw), PWiseRLoss])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"margin_click": -0.1}, "margin_click: found -0.1"),
        ({"margin_nonclick": math.nan}, "margin_nonclick: found nan"),
        ({"margin_nonclick": math.inf}, "margin_nonclick: found inf"),
        ({"normalization": "mean"}, "found 'mean', expected 'pairs' or 'negatives'"),
    ],
)
def test_wrong_settings_are_refused(make, setting, message):
    with pytest.raises(ValueError, match=message):
        make(**setting)


# --- PWiseRLoss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["auto", "none", "sum", "sum_over_batch_size"])
def test_every_reduction_gives_the_same_scalar(reduction):
    scores, grade = random_case(seed=17)
    loss = PWiseRLoss(0.1, 0.3, normalization="negatives", reduction=reduction)
    expected, _ = oracles.pwiser(scores, grade, 0.1, 0.3, "negatives")
    assert loss(grade, scores).numpy() == pytest.approx(expected, rel=1e-12)


def test_from_logits_takes_the_sigmoid_first():
    scores, grade = random_case(seed=18)
    logits = np.log(scores / (1 - scores))
    loss = PWiseRLoss(0.1, 0.3, from_logits=True)
    expected, _ = oracles.pwiser(scores, grade, 0.1, 0.3)
    assert loss(grade, logits).numpy() == pytest.approx(expected, rel=1e-9)
    assert PWiseRLoss(0.1, 0.3)(grade, logits).numpy() != pytest.approx(expected, rel=0.1)


def test_from_logits_in_half_precision_takes_the_sigmoid_in_float32():
    # Sigmoids of bfloat16 logits near -7, kept in bfloat16, would be off by up to 4e-3 relative.
    logits = tf.cast(np.linspace(-7.5, -6.5, 60), tf.bfloat16)
    _, grade = random_case(seed=18)
    exact = tf.sigmoid(tf.cast(logits, tf.float64)).numpy()
    expected, _ = oracles.pwiser(exact, grade, 0.0, 0.0)
    loss = PWiseRLoss(0.0, 0.0, from_logits=True)(grade, logits)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_logits_at_the_extremes():
    logits = tf.constant([1e4, -1e4, 1e4, -1e4])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = PWiseRLoss(0.05, 0.1, from_logits=True)([0, 0, 2, 2], logits)
    # Of the four pairs the wrong one costs 1.1, two ties cost the margin, the right one nothing.
    assert loss.numpy() == pytest.approx((1.1**2 + 2 * 0.1**2) / 4, rel=1e-6)
    np.testing.assert_array_equal(tape.gradient(loss, logits), 0)


def test_sample_weights_are_refused():
    with pytest.raises(ValueError, match="takes no sample_weight"):
        PWiseRLoss()([0, 2], [0.1, 0.2], sample_weight=[1.0, 2.0])


def test_serialisation_round_trip():
    loss = PWiseRLoss(0.2, 0.4, True, "negatives", reduction="sum", name="rank")
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert isinstance(again, PWiseRLoss)
    assert again.get_config() == loss.get_config()
    assert again.get_config() == {
        "margin_click": 0.2,
        "margin_nonclick": 0.4,
        "from_logits": True,
        "normalization": "negatives",
        "reduction": "sum",
        "name": "rank",
    }
    logits, grade = random_case(seed=19, spread=2)
    assert again(grade, logits).numpy() == loss(grade, logits).numpy()


def click_data(rows=512):
    """Features [rows, 4], float32, and grades that follow the first one."""
    features = np.random.default_rng(20).normal(size=(rows, 4)).astype(np.float32)
    return features, (features[:, 0] > 0.5).astype(np.int64) + (features[:, 0] > 1.3)


def test_keras_compile_fit_save_and_load(tmp_path):
    features, grade = click_data()
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Dense(1, "sigmoid", input_shape=(4,))])
    model.compile(keras.optimizers.Adam(0.05), PWiseRLoss(0.5, 0.5))
    history = model.fit(features, grade, batch_size=128, epochs=8, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]

    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.loss.get_config() == model.loss.get_config()
    expected = pwiser(model.predict(features, verbose=0), grade, 0.5, 0.5)
    loss = again.evaluate(features, grade, batch_size=512, verbose=0)
    assert loss == pytest.approx(float(expected), rel=1e-6)


def run_script(script):
    """Runs Python code in its own process, in the project's root; it must succeed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "KERAS_"))}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**environment, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_two_replicas_give_the_mean_of_their_own_losses():
    run_script("""
import numpy as np
from pwiser_tf.losses import PWiseRLoss, pwiser
import tensorflow as tf
import tf_keras as keras

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
x = np.random.default_rng(0).normal(size=(64, 1)).astype(np.float32)
grade = np.arange(64) % 3

with strategy.scope():
    model = keras.Sequential([keras.layers.Dense(1, "sigmoid", input_shape=(1,))])
    model.compile(keras.optimizers.SGD(1.0), PWiseRLoss(0.5, 0.5))
weights = [tf.Variable(w) for w in model.get_weights()]
history = model.fit(x, grade, batch_size=64, shuffle=False, verbose=0).history

with tf.GradientTape() as tape:
    scores = tf.sigmoid(x @ weights[0] + weights[1])
    halves = [pwiser(scores[half], grade[half], 0.5, 0.5) for half in (slice(32), slice(32, 64))]
    loss = (halves[0] + halves[1]) / 2
gradients = tape.gradient(loss, weights)
np.testing.assert_allclose(history["loss"], [loss], rtol=1e-5)
for trained, before, gradient in zip(model.get_weights(), weights, gradients):
    np.testing.assert_allclose(trained, before - gradient, rtol=1e-5, atol=1e-7)

# In a custom training loop Keras refuses AUTO; SUM and NONE give each replica's loss.
for reduction in ("sum", "none"):
    loss_object = PWiseRLoss(0.5, 0.5, reduction=reduction)
    per_replica = strategy.run(lambda: loss_object(grade, scores))
    whole = pwiser(scores, grade, 0.5, 0.5)
    np.testing.assert_allclose(strategy.experimental_local_results(per_replica), [whole] * 2)
try:
    strategy.run(lambda: PWiseRLoss()(grade, scores))
except ValueError as error:
    assert "Reduction.SUM" in str(error), error
else:
    raise AssertionError("AUTO was accepted")
""")


@pytest.mark.slow
def test_the_function_trains_a_keras_3_model():
    run_script("""
import os
os.environ["KERAS_BACKEND"] = "tensorflow"
import keras
import numpy as np
from pwiser_tf.losses import pwiser

assert keras.__version__.startswith("3."), keras.__version__
features = np.random.default_rng(20).normal(size=(512, 4)).astype(np.float32)
grade = (features[:, 0] > 0.5).astype(np.int64) + (features[:, 0] > 1.3)
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, "sigmoid")])

def loss(grade, scores):
    labels = keras.ops.cast(keras.ops.reshape(grade, (-1, 1)) > 0, "float32")
    bce = keras.ops.mean(keras.losses.binary_crossentropy(labels, scores))
    return bce + pwiser(scores, grade, 0.5, 0.5)

model.compile(keras.optimizers.Adam(0.05), loss, jit_compile=False)
before = float(pwiser(model(features), grade, 0.5, 0.5))
history = model.fit(features, grade, batch_size=128, epochs=8, verbose=0).history["loss"]
after = float(pwiser(model(features), grade, 0.5, 0.5))
assert history[-1] < 0.7 * history[0], history
assert after < 0.5 * before, (before, after)
""")


# --- strength ------------------------------------------------------------------------------------


def push_of_bce(scores, labels):
    """The gradient of the mean cross-entropy, by TensorFlow."""
    scores = tf.convert_to_tensor(scores)
    with tf.GradientTape() as tape:
        tape.watch(scores)
        entropy = -tf.math.log(tf.where(labels, scores, 1 - scores))
        mean = tf.reduce_mean(entropy)
    return tape.gradient(mean, scores).numpy()


def test_strength_by_arithmetic():
    assert strength(0.1, 0.05, 0.1, cvr=0.03) == pytest.approx(2 * 0.1 * 0.15 / 0.03)


@pytest.mark.parametrize(("spread", "tolerance"), [(0.0, 1e-9), (0.5, 0.05)])
def test_strength_is_the_ratio_of_the_gradients_on_the_ctr_head(spread, tolerance):
    # 20,000 rows, 40 clicks, 5 of them conversions; predictions at the base rate, and around it.
    grade = np.repeat([0, 1, 2], [19_960, 35, 5])
    noise = np.random.default_rng(21).uniform(-spread, spread, len(grade))
    scores = 40 / 20_000 * (1 + noise)
    _, gradient = loss_and_gradient(scores, grade, 0.05, 0.1)
    conversions = grade == 2
    pushed = 0.3 * gradient[conversions]
    by_bce = push_of_bce(np.full(len(grade), 40 / 20_000), grade >= 1)[conversions]
    expected = strength(0.3, 0.05, 0.1, cvr=5 / 40)
    np.testing.assert_allclose(pushed / by_bce, expected, rtol=tolerance)


def test_strength_with_a_cvr_of_one_is_the_ratio_on_the_ctcvr_head():
    grade = np.repeat([0, 1, 2], [19_960, 35, 5])
    scores = np.full(len(grade), 5 / 20_000)
    _, gradient = loss_and_gradient(scores, grade, 0.05, 0.1)
    by_bce = push_of_bce(scores, grade == 2)
    expected = strength(0.3, 0.05, 0.1, cvr=1)
    np.testing.assert_allclose((0.3 * gradient / by_bce)[grade == 2], expected, rtol=1e-9)


@pytest.mark.parametrize("cvr", [0, -0.1, 1.1, math.nan])
def test_strength_refuses_an_impossible_cvr(cvr):
    with pytest.raises(ValueError, match="cvr: found"):
        strength(0.1, 0.05, 0.1, cvr)
