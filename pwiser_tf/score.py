"""A score to rank by: a product of powers of a model's outputs, such as ctr^0.75*ctcvr^0.25.

A blend of two cross-entropy heads is the simple alternative to a click loss that knows about
conversions: with ctr^(1-w)*ctcvr^w, w chooses between clicks and conversions after training.
"""

import dataclasses
import math
import re
from collections.abc import Collection

import numpy as np
import tensorflow as tf

from pwiser_tf import metrics
from pwiser_tf.errors import DataError

# The value of --score that searches a blend.
SEARCH = "search"
# The weights w of log ctcvr in (1 - w) log ctr + w log ctcvr that a search tries.
WEIGHTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
# What a score may contain, if the model has it.
FACTORS = ("ctr", "cvr", "ctcvr", "interest")

_TERM = re.compile(r"(\w+)\s*(?:\^\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?))?")
_LARGEST_EXPONENT = 10.0
# An output below it counts as it, so that its logarithm is finite.
_LOWEST = 1e-30
# The logarithm of a score is kept in this range, so that the score is finite and not 0 in float32.
_LOG_RANGE = -87.0, 87.0


@dataclasses.dataclass(frozen=True)
class Score:
    """A product of powers, as factors: output to exponent, none of them 0."""

    exponents: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> "Score":
        """Reads "ctr^0.75*ctcvr^0.25". A factor without "^" has the exponent 1.

        Raises:
          DataError: text of another form, an unknown or repeated output, an exponent of 0 or
            outside [-10, 10].
        """
        exponents: dict[str, float] = {}
        for term in text.split("*"):
            found = _TERM.fullmatch(term.strip())
            if not found:
                raise DataError(
                    f"--score={text}: found {term.strip()!r}, expected factors such as ctr^0.75, "
                    "with * between them"
                )
            name, exponent = found[1], float(found[2] or 1)
            if name not in FACTORS:
                raise DataError(
                    f"--score={text}: unknown output {name}; expected {', '.join(FACTORS)}"
                )
            if name in exponents:
                raise DataError(f"--score={text}: {name} is there twice")
            if not 0 < abs(exponent) <= _LARGEST_EXPONENT:
                raise DataError(
                    f"--score={text}: the exponent of {name} is {exponent:g}, expected a number "
                    f"from -{_LARGEST_EXPONENT:g} to {_LARGEST_EXPONENT:g} that is not 0"
                )
            exponents[name] = exponent
        return cls(exponents)

    @classmethod
    def blend(cls, weight: float) -> "Score":
        """ctr^(1-weight)*ctcvr^weight."""
        exponents = {"ctr": 1 - weight, "ctcvr": weight}
        return cls({name: exponent for name, exponent in exponents.items() if exponent})

    def __str__(self) -> str:
        return "*".join(
            name if exponent == 1 else f"{name}^{exponent:g}"
            for name, exponent in self.exponents.items()
        )

    def require(self, outputs: Collection[str]) -> None:
        """Raises DataError if the score needs an output that is not among those of the model."""
        for name in self.exponents:
            if name not in outputs:
                have = ", ".join(output for output in FACTORS if output in outputs)
                raise DataError(f"--score={self}: the model has no output {name}, only {have}")

    def logarithm(self, predictions: dict[str, np.ndarray]) -> np.ndarray:
        """The logarithm of the score of predictions (output to [n]): float64 [n]."""
        return sum(
            exponent * np.log(np.maximum(np.asarray(predictions[name], np.float64), _LOWEST))
            for name, exponent in self.exponents.items()
        )

    def values(self, predictions: dict[str, np.ndarray]) -> np.ndarray:
        """The score of predictions (output to [n]): float32 [n], above 0."""
        return np.exp(np.clip(self.logarithm(predictions), *_LOG_RANGE)).astype(np.float32)

    def add_to(self, outputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """A model's outputs, float32 [batch] each, and the "score", computed in the graph."""
        logarithm = tf.add_n(
            [
                exponent * tf.math.log(tf.maximum(outputs[name], _LOWEST))
                for name, exponent in self.exponents.items()
            ]
        )
        return {**outputs, "score": tf.exp(tf.clip_by_value(logarithm, *_LOG_RANGE))}


def ranking(
    grade: np.ndarray, scores: np.ndarray, group: np.ndarray | None = None
) -> dict[str, float | None]:
    """How well a score ranks, ready for JSON.

    Args:
      grade: integers [n] in {0, 1, 2}. scores: [n]. group: [n], or None.

    Returns:
      click_auc, click_gauc, conversion_auc, conversion_gauc over all exposures; None where
      undefined.
    """
    found: dict[str, float | None] = {}
    for label, task in (("click", "ctr"), ("conversion", "ctcvr")):
        _, positive = metrics.task_labels(grade, task)
        found[f"{label}_auc"] = metrics.auc(positive, scores)
        by_group = math.nan if group is None else metrics.gauc(positive, scores, group)[0]
        found[f"{label}_gauc"] = by_group
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def search(
    grade: np.ndarray, predictions: dict[str, np.ndarray]
) -> tuple[Score, list[dict[str, float | None]]]:
    """The blend of WEIGHTS with the best AUC for conversions, of equal ones the first.

    Args:
      grade: integers [n] in {0, 1, 2}, of the validation split. predictions: output to [n].

    Returns:
      The blend, and for each weight {"weight", "click_auc", "conversion_auc"}.

    Raises:
      DataError: the model has no ctcvr, or validation has one class of conversions.
    """
    if "ctcvr" not in predictions:
        raise DataError(f"--score={SEARCH}: the data have no conversions, so there is no blend")
    tried = []
    for weight in WEIGHTS:
        found = ranking(grade, Score.blend(weight).values(predictions))
        tried.append({"weight": weight, **{key: found[key] for key in found if "gauc" not in key}})
    if tried[0]["conversion_auc"] is None:
        raise DataError(
            f"--score={SEARCH}: the validation split needs rows with and without a conversion"
        )
    best = max(tried, key=lambda entry: entry["conversion_auc"])
    return Score.blend(best["weight"]), tried
