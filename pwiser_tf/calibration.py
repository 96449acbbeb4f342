"""Platt scaling: two numbers a head that turn an output into a calibrated probability.

A ranking loss, focal loss or weighted conversions shift the probabilities of a model. Platt scaling
(Platt, "Probabilistic outputs for support vector machines", 1999) repairs their level and spread
with a slope s and an intercept i:

    ctr'   = sigmoid(s * logit(ctr) + i)
    ctcvr' = min(sigmoid(s * logit(ctcvr) + i), ctr')
    cvr'   = ctcvr' / ctr'

Both are fitted by cross-entropy on the validation split, after training. Platt's smoothed targets
are not used: the sum of the calibrated predictions is then the number of positives. The slope is
positive, so that the order of the rows by an output stays (of ctcvr: where ctr' is no bound).
"""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from pwiser_tf import metrics

METHODS = ("auto", "none", "platt")
# The outputs that are scaled; cvr follows from them.
HEADS = ("ctr", "ctcvr")

# Probabilities are clipped to [_LOWEST, _HIGHEST] before their logit: float32 has no number between
# _HIGHEST and 1.
_LOWEST, _HIGHEST = 1e-30, 1 - 2**-24
# Of Newton's method: the largest number of steps, and the gain in log-likelihood of the last one.
_STEPS, _SMALLEST_GAIN = 100, 1e-12


class NotCalibrated(ValueError):
    """A head has no calibration; the message says why."""


@dataclasses.dataclass(frozen=True)
class Platt:
    """p' = sigmoid(slope * logit(p) + intercept)."""

    slope: float
    intercept: float

    def __call__(self, probability: tf.Tensor) -> tf.Tensor:
        """Probabilities [batch] to calibrated probabilities float32 [batch]."""
        clipped = tf.clip_by_value(tf.cast(probability, tf.float32), _LOWEST, _HIGHEST)
        logit = tf.math.log(clipped) - tf.math.log1p(-clipped)
        return tf.sigmoid(self.slope * logit + self.intercept)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The calibration of a model: head to Platt. A head that is absent is not changed."""

    heads: dict[str, Platt]

    def apply(self, outputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The outputs of a model, each float32 [batch], calibrated; ctcvr = ctr * cvr <= ctr.

        Outputs other than ctr, cvr and ctcvr are not changed. The two numbers of a head become
        constants of the graph.
        """
        scaled = {
            name: self.heads[name](outputs[name]) if name in self.heads else outputs[name]
            for name in HEADS
            if name in outputs
        }
        if "ctcvr" in scaled:
            scaled["ctcvr"] = tf.minimum(scaled["ctcvr"], scaled["ctr"])
            scaled["cvr"] = tf.math.divide_no_nan(scaled["ctcvr"], scaled["ctr"])
        return {**outputs, **scaled}

    def to_json(self) -> dict:
        """The content of calibration.json."""
        return {name: dataclasses.asdict(head) for name, head in self.heads.items()}

    @classmethod
    def from_json(cls, content: dict) -> "Calibration":
        """Reads the content of a calibration.json. Raises ValueError if it is not one."""
        heads = {}
        for name, values in content.items():
            if name not in HEADS:
                raise ValueError(f"expected heads among {', '.join(HEADS)}, found {name!r}")
            if not isinstance(values, dict) or set(values) != {"slope", "intercept"}:
                raise ValueError(f"{name}: expected a slope and an intercept, found {values!r}")
            if not all(type(v) in (int, float) and math.isfinite(v) for v in values.values()):
                raise ValueError(f"{name}: expected finite numbers, found {values!r}")
            if values["slope"] <= 0:
                raise ValueError(f"{name}: expected a slope above 0, found {values['slope']}")
            heads[name] = Platt(**values)
        return cls(heads)


def fit(labels: np.ndarray, probabilities: np.ndarray) -> Platt:
    """Fits a head by cross-entropy: logistic regression on the logit, Newton's method in float64.

    Args:
      labels: [n] in {0, 1}. probabilities: [n] in [0, 1].

    Raises:
      NotCalibrated: there is only one class, the predictions are equal or do not rise with the
        labels, or no finite slope is best, because a threshold separates the classes.
    """
    positive = np.asarray(labels) == 1
    for name, absent in (("positives", not positive.any()), ("negatives", positive.all())):
        if absent:
            raise NotCalibrated(f"there are no {name}")
    clipped = np.clip(np.asarray(probabilities, np.float64), _LOWEST, _HIGHEST)
    logit = np.log(clipped) - np.log1p(-clipped)
    if logit.min() == logit.max():
        raise NotCalibrated("all predictions are equal")
    of_positives, of_negatives = logit[positive], logit[~positive]
    if of_positives.min() >= of_negatives.max():
        raise NotCalibrated("the predictions separate the classes")
    if of_positives.max() <= of_negatives.min():
        raise NotCalibrated("the predictions do not rise with the labels")
    # Centred and of unit size, so that the two numbers are fitted equally well.
    center, size = logit.mean(), logit.std()
    slope, intercept = _newton((logit - center) / size, positive)
    if slope <= 0:
        raise NotCalibrated("the predictions do not rise with the labels")
    return Platt(float(slope / size), float(intercept - slope / size * center))


def _newton(x: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """(slope, intercept) of the logistic regression on x [n], from the base rate on."""

    def loss(parameters) -> float:
        z = parameters[0] * x + parameters[1]
        return float((np.logaddexp(0, z) - np.where(positive, z, 0)).sum())

    rate = positive.mean()
    parameters = np.array([0.0, math.log(rate / (1 - rate))])
    current = loss(parameters)
    for _ in range(_STEPS):
        z = parameters[0] * x + parameters[1]
        # Without overflow: exp of a negative number.
        smaller = np.exp(-np.abs(z))
        p = np.where(z >= 0, 1.0, smaller) / (1 + smaller)
        weight = smaller / (1 + smaller) ** 2
        error = p - positive
        gradient = np.array([(error * x).sum(), error.sum()])
        of_both = (weight * x).sum()
        hessian = np.array([[(weight * x * x).sum(), of_both], [of_both, weight.sum()]])
        try:
            step = np.linalg.solve(hessian, gradient)
        except np.linalg.LinAlgError:
            break
        gain = gradient @ step
        scale = 1.0
        while (found := loss(parameters - scale * step)) > current and gain > _SMALLEST_GAIN:
            scale /= 2
            if scale < 1e-10:
                raise NotCalibrated("the fit did not converge")
        parameters, current = parameters - scale * step, found
        if gain <= _SMALLEST_GAIN:
            return parameters
    raise NotCalibrated("the fit did not converge")


def fit_heads(
    grade: np.ndarray, predictions: dict[str, np.ndarray]
) -> tuple[Calibration, dict[str, str]]:
    """Fits every head of a model.

    Args:
      grade: integers [n] in {0, 1, 2}. predictions: the model's outputs, float [n].

    Returns:
      The calibration, and why the heads that it leaves out have none: {head: reason}.
    """
    heads, reasons = {}, {}
    for name in HEADS:
        if name in predictions:
            try:
                heads[name] = fit(metrics.task_labels(grade, name)[1], predictions[name])
            except NotCalibrated as error:
                reasons[name] = str(error)
    return Calibration(heads), reasons
