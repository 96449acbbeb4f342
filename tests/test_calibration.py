"""Platt scaling: the fit by arithmetic, its use in the graph, and the run that stores it."""

import json
import math
import shutil

import numpy as np
import pytest
import tensorflow as tf

from pwiser_tf import export, metrics, runs, training
from pwiser_tf.calibration import Calibration, NotCalibrated, Platt, fit, fit_heads
from pwiser_tf.errors import DataError
from pwiser_tf.evaluation import predict
from pwiser_tf.schema import Schema
from pwiser_tf.tasks import LossConfig


def _logit(p):
    return math.log(p / (1 - p))


def test_two_predictions_become_their_observed_rates():
    """Of 10 rows with .5 are 2 positive, of 10 with .8 are 5: two numbers fit both rates."""
    labels = np.repeat([1, 0, 1, 0], [2, 8, 5, 5])
    found = fit(labels, np.repeat([0.5, 0.8], 10))
    # logit(.5) = 0, so the intercept is logit(.2); the slope makes logit(.8) into logit(.5) = 0.
    assert found.intercept == pytest.approx(_logit(0.2), rel=1e-9)
    assert found.slope == pytest.approx(-_logit(0.2) / _logit(0.8), rel=1e-9)
    np.testing.assert_allclose(found(np.float32([0.5, 0.8])), [0.2, 0.5], rtol=1e-6)


def test_the_fit_recovers_the_numbers_and_the_sum_of_the_labels():
    random = np.random.default_rng(3)
    raw = random.normal(-6, 1.5, 300_000)
    truth = 1 / (1 + np.exp(-(0.6 * raw - 1)))
    labels = random.random(len(raw)) < truth
    predictions = (1 / (1 + np.exp(-raw))).astype(np.float32)
    found = fit(labels, predictions)
    assert found.slope == pytest.approx(0.6, abs=0.05)
    assert found.intercept == pytest.approx(-1, abs=0.3)
    assert metrics.pcoc(labels, found(predictions).numpy()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("labels", "predictions", "reason"),
    [
        ([0, 0, 0], [0.1, 0.2, 0.3], "no positives"),
        ([1, 1], [0.1, 0.2], "no negatives"),
        ([0, 1, 1, 0], [0.3] * 4, "equal"),
        ([0, 0, 1, 1], [0.1, 0.2, 0.2, 0.3], "separate"),
        ([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4], "do not rise"),
        ([1, 0, 1, 0, 0, 0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "do not rise"),
    ],
)
def test_a_head_without_a_fit_says_why(labels, predictions, reason):
    with pytest.raises(NotCalibrated, match=reason):
        fit(np.array(labels), np.array(predictions))


def test_predictions_at_0_and_1_are_fitted_and_scaled():
    labels = np.tile([0, 1, 0, 1, 1], 20)
    extremes = np.float32([0.0, 1.0, 0.4, 0.3, 1e-20] * 20)
    found = fit(labels, extremes)
    assert math.isfinite(found.slope)
    assert math.isfinite(found.intercept)
    for platt in (found, Platt(50.0, -3.0), Platt(1e-3, 90.0)):
        scaled = platt(tf.constant([0.0, 1e-38, 1e-20, 0.5, 1 - 2**-24, 1.0])).numpy()
        assert np.isfinite(scaled).all()
        assert (np.diff(scaled) >= 0).all()
        assert scaled.min() >= 0
        assert scaled.max() <= 1


def test_the_identity_changes_nothing():
    p = np.float32(np.concatenate([10.0 ** -np.arange(1.0, 29), 1 - 2.0 ** -np.arange(1, 24)]))
    np.testing.assert_allclose(Platt(1.0, 0.0)(p), p, rtol=3e-5)


def test_outputs_stay_nested_and_interest_is_not_scaled():
    calibration = Calibration({"ctr": Platt(1.0, -20.0), "ctcvr": Platt(0.5, 1.0)})
    outputs = {
        "ctr": tf.constant([0.5, 0.0, 1.0, 1e-30]),
        "cvr": tf.constant([0.2, 1.0, 0.3, 1.0]),
        "ctcvr": tf.constant([0.1, 0.0, 0.3, 1e-30]),
        "interest": tf.constant([0.7, 0.8, 0.9, 0.1]),
    }
    found = {name: value.numpy() for name, value in calibration.apply(outputs).items()}
    assert list(found) == ["ctr", "cvr", "ctcvr", "interest"]
    np.testing.assert_array_equal(found["interest"], outputs["interest"])
    assert (found["ctcvr"] <= found["ctr"]).all()
    np.testing.assert_allclose(found["ctr"] * found["cvr"], found["ctcvr"], rtol=1e-6)
    assert found["ctr"][0] == pytest.approx(1 / (1 + math.exp(20)), rel=1e-5)
    # A ctr of 0 has a cvr of 0, not NaN.
    zero = Calibration({"ctr": Platt(9.0, 0.0)}).apply(outputs)
    assert zero["ctr"][1] == zero["cvr"][1] == zero["ctcvr"][1] == 0


def test_a_head_alone_and_clicks_only():
    outputs = {"ctr": tf.constant([0.2]), "cvr": tf.constant([0.9]), "ctcvr": tf.constant([0.18])}
    # logit(.2) = -log 4, so the intercept log(2/3) gives odds of 1/6.
    scaled = Calibration({"ctr": Platt(1.0, math.log(2 / 3))}).apply(outputs)
    for name, expected in (("ctr", 1 / 7), ("ctcvr", 1 / 7), ("cvr", 1)):
        np.testing.assert_allclose(scaled[name], [expected], rtol=1e-6)
    alone = Calibration({"ctr": Platt(1.0, 0.0)}).apply({"ctr": outputs["ctr"]})
    assert list(alone) == ["ctr"]


def test_heads_are_fitted_to_their_labels():
    grade = np.array([0, 1, 0, 1] * 5)
    predictions = {"ctr": np.array([0.1, 0.2, 0.3, 0.25] * 5), "ctcvr": np.full(20, 0.1)}
    calibration, reasons = fit_heads(grade, predictions)
    assert list(calibration.heads) == ["ctr"]
    assert reasons == {"ctcvr": "there are no positives"}
    assert Calibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"name": "bce"}, True),
        ({"name": "bce", "conversion_weight": 4.0}, False),
        ({"name": "pwiser"}, False),
        ({"name": "pwiser", "pwiser_weight": 0.0}, True),
        ({"name": "pwiser", "loss_tasks": ()}, True),
        ({"name": "ranknet", "loss_tasks": ("ctcvr",)}, False),
        ({"name": "focal"}, False),
    ],
)
def test_which_losses_are_cross_entropy(options, plain):
    assert LossConfig(**options).is_cross_entropy == plain


def test_clicks_only_data_have_no_weighted_conversions():
    assert LossConfig("pwiser", conversion_weight=4.0).without_conversions().is_cross_entropy


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"foo": {"slope": 1, "intercept": 0}}',
        '{"ctr": {"slope": 1}}',
        '{"ctr": {"slope": 0, "intercept": 0}}',
        '{"ctr": {"slope": "1", "intercept": 0}}',
        '{"ctr": {"slope": NaN, "intercept": 0}}',
        '{"ctr": 3}',
    ],
)
def test_a_damaged_file_is_one_error(content, tmp_path):
    (tmp_path / runs.CALIBRATION_FILE).write_text(content)
    with pytest.raises(DataError, match=r"calibration\.json: not"):
        runs.load_calibration(tmp_path)


@pytest.fixture(scope="module")
def weighted(settings, tmp_path_factory):
    """A run whose weighted conversions break calibration, and what the training printed."""
    folder = tmp_path_factory.mktemp("weighted") / "run"
    chosen = settings.replace(loss="bce", conversion_weight=20.0, epochs=3)
    training.train(chosen, folder)
    return folder, chosen


@pytest.mark.slow
def test_a_run_is_calibrated_on_validation_and_everywhere_the_same(weighted, dataset, tmp_path):
    folder, _ = weighted
    model, _, _ = runs.load_run(folder)
    content = json.loads((folder / "metrics.json").read_text())
    best = content["epochs"][content["best_epoch"] - 1]["validation"]
    # Epochs are chosen by uncalibrated outputs.
    assert best["ctcvr"]["pcoc"] > 1.3
    for task in ("ctr", "ctcvr"):
        # Not exactly 1 where ctr bounds ctcvr.
        assert content["validation"][task]["pcoc"] == pytest.approx(1, abs=0.05)
    calibrated, grade, _ = predict(model, dataset, Schema.load(dataset), "validation")
    assert (calibrated["ctcvr"] <= calibrated["ctr"]).all()
    calibration, model.calibration = model.calibration, None
    plain, _, _ = predict(model, dataset, Schema.load(dataset), "validation")
    assert fit_heads(grade, plain)[0].to_json() == calibration.to_json()
    np.testing.assert_allclose(calibration.apply(plain)["ctr"], calibrated["ctr"], rtol=1e-5)
    features = {"categorical": np.zeros((2, 3), np.int64), "numerical": np.zeros((2, 2))}
    features["numerical"] = features["numerical"].astype(np.float32)

    exported = export.export(folder, tmp_path / "models", "m")
    answer = tf.saved_model.load(str(exported)).signatures["predict"]
    found = answer(categorical=features["categorical"], numerical=features["numerical"])
    model.calibration = calibration
    expected = model(features)
    model.calibration = None
    uncalibrated = model(features)
    for name in ("ctr", "cvr", "ctcvr"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    assert abs(found["ctcvr"][0] / uncalibrated["ctcvr"][0] - 1) > 0.1
    # Training is not calibrated. (It changes the means of batch normalization: at the end.)
    model.calibration = Calibration({"ctr": Platt(1.0, -50.0)})
    assert model(features)["ctr"].numpy().max() < 1e-10
    assert model(features, training=True)["ctr"].numpy().min() > 1e-10


@pytest.mark.slow
def test_the_same_command_again_and_a_longer_run(weighted, tmp_path, capsys, unrendered):
    folder, chosen = weighted
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    before = (copy / runs.CALIBRATION_FILE).read_text()
    (copy / runs.CALIBRATION_FILE).unlink()
    training.train(chosen, copy)
    assert (copy / runs.CALIBRATION_FILE).read_text() == before
    assert "calibration on validation: ctr slope" in capsys.readouterr().out
    again = json.loads((copy / "metrics.json").read_text())
    assert again["test"] == json.loads((folder / "metrics.json").read_text())["test"]
    # Another calibration needs no other training.
    training.train(chosen.replace(calibration="none"), copy)
    assert not (copy / runs.CALIBRATION_FILE).exists()
    training.train(chosen.replace(calibration="platt"), copy)
    assert (copy / runs.CALIBRATION_FILE).read_text() == before
    # A longer run with a new best epoch does not keep the calibration of the old one.
    _, _, progress = training.fit(chosen.replace(calibration="platt", epochs=6, patience=6), copy)
    assert (copy / runs.CALIBRATION_FILE).exists() == (progress.best_epoch < 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "calibrated"),
    [
        ({"loss": "bce"}, False),
        ({"loss": "bce", "calibration": "platt"}, True),
        ({"loss": "pwiser", "calibration": "none"}, False),
    ],
)
def test_what_calibrates(changes, calibrated, settings, tmp_path, unrendered, capsys):
    training.train(settings.replace(**changes, epochs=1), tmp_path / "run")
    assert (tmp_path / "run" / runs.CALIBRATION_FILE).exists() == calibrated
    assert ("calibration on validation" in capsys.readouterr().out) == calibrated
