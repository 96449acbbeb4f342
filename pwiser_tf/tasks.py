"""Tasks: what a tower learns. A task is a name, the label it learns, its loss and its weight.

Every task here is defined on all exposures; its label is 1 where the row's grade is high enough.
"""

import dataclasses

import tensorflow as tf
import tf_keras as keras

from pwiser_tf import losses

CONVERSION = 2
# The label of a task is 1 where the grade reaches this.
POSITIVE_GRADE = {"ctr": 1, "ctcvr": CONVERSION}
TASKS = tuple(POSITIVE_GRADE)

LOSSES = ("bce", "pwiser", "ranknet", "combined_pair", "jrc", "listce", "focal")
# These compare the rows of one group, and need to know it.
GROUP_LOSSES = ("jrc", "listce")
SCORE_SPACES = ("probability", "logit")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How a task is learnt. By the name of its loss:

        bce            binary cross-entropy
        pwiser         BCE + pwiser_weight * PWiseR
        ranknet, combined_pair, jrc, listce
                       BCE + ranking_weight * the term of that name (see pwiser_tf.losses)
        focal          focal loss in the place of BCE

    Attributes:
      weight: the task's share in the sum over tasks.
      conversion_weight: rows with a conversion count so many times in BCE (or focal).
      loss: one of LOSSES.
      pwiser_weight: lambda of pwiser; 0 is plain BCE.
      margin_click, margin_nonclick: PWiseR's margins, in the units of score_space.
      score_space: what PWiseR ranks, "probability" or "logit".
      ranking_weight: lambda of the four others; 0 is plain BCE.
      focal_gamma: how much focal turns easy rows down.

    Raises:
      ValueError: an unknown loss or score_space.
    """

    weight: float = 0.5
    conversion_weight: float = 1.0
    loss: str = "bce"
    pwiser_weight: float = 0.1
    margin_click: float = 0.05
    margin_nonclick: float = 0.1
    score_space: str = "probability"
    ranking_weight: float = 0.1
    focal_gamma: float = 2.0

    def __post_init__(self):
        for name, names in (("loss", LOSSES), ("score_space", SCORE_SPACES)):
            if getattr(self, name) not in names:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected one of {names}")


class TaskLoss(keras.losses.Loss):
    """The loss of one task, from a batch's grades and its logits: one number.

    Called with y_true {"grade": int64 [B], "group": int64 [B] where the data has one} and y_pred
    {"logits": float32 [B], "energy": float32 [B] where the loss is jrc}. The number is a mean over
    rows (BCE, focal) and one over pairs, rows or groups (the term), so the reduction is SUM: there
    is nothing left to average.

    Raises:
      ValueError: when called, a loss of GROUP_LOSSES without groups.
    """

    def __init__(self, task: str, config: LossConfig):
        super().__init__(reduction=keras.losses.Reduction.SUM, name=f"{task}_loss")
        self._positive_grade = POSITIVE_GRADE[task]
        self._config = config

    def call(self, labels: dict[str, tf.Tensor], predictions: dict[str, tf.Tensor]) -> tf.Tensor:
        config, grade, logits = self._config, labels["grade"], predictions["logits"]
        positive = tf.cast(grade >= self._positive_grade, logits.dtype)
        if config.loss == "focal":
            of_rows = losses.focal(logits, positive, config.focal_gamma)
        else:
            of_rows = tf.nn.sigmoid_cross_entropy_with_logits(positive, logits)
        if config.conversion_weight != 1:
            # As if each such row stood in the batch so many times: the mean divides by all of them.
            weights = tf.where(grade == CONVERSION, config.conversion_weight, 1.0)
            loss = tf.reduce_sum(weights * of_rows) / tf.reduce_sum(weights)
        else:
            loss = tf.reduce_mean(of_rows)
        term_weight = config.pwiser_weight if config.loss == "pwiser" else config.ranking_weight
        if config.loss in ("bce", "focal") or not term_weight:
            return loss
        return loss + term_weight * self._term(positive, labels, predictions)

    def _term(self, positive, labels, predictions) -> tf.Tensor:
        config, logits = self._config, predictions["logits"]
        if config.loss in GROUP_LOSSES and "group" not in labels:
            raise ValueError(
                f"loss {config.loss!r} compares the rows of one group: expected 'group' among the "
                f"labels, found {sorted(labels)}"
            )
        if config.loss == "ranknet":
            return losses.pairwise_logistic(logits, labels["grade"])
        if config.loss == "combined_pair":
            return losses.combined_pair(logits, positive)
        if config.loss == "jrc":
            return losses.jrc(logits, predictions["energy"], positive, labels["group"])
        if config.loss == "listce":
            return losses.listce(logits, positive, labels["group"])
        scores = tf.sigmoid(logits) if config.score_space == "probability" else logits
        return losses.pwiser(scores, labels["grade"], config.margin_click, config.margin_nonclick)
