"""Tasks: what a tower learns. A task is a name, the label it learns, its loss and its weight.

Every task here is defined on all exposures; its label is 1 where the row's grade is high enough.
"""

import dataclasses

import tensorflow as tf
import tf_keras as keras

from pwiser_tf.losses import PWiseRLoss

CONVERSION = 2
# The label of a task is 1 where the grade reaches this.
POSITIVE_GRADE = {"ctr": 1, "ctcvr": CONVERSION}
TASKS = tuple(POSITIVE_GRADE)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How a task is learnt: weight * (BCE + pwiser_weight * PWiseR).

    Attributes:
      weight: the task's share in the sum over tasks.
      conversion_weight: rows with a conversion count so many times in BCE.
      pwiser_weight: lambda; 0 is plain BCE.
      margin_click, margin_nonclick: PWiseR's margins, in probability.
    """

    weight: float = 0.5
    conversion_weight: float = 1.0
    loss: str = "bce"
    pwiser_weight: float = 0.0
    margin_click: float = 0.05
    margin_nonclick: float = 0.1


class TaskLoss(keras.losses.Loss):
    """BCE + pwiser_weight * PWiseR of one task, from grades and logits, both [batch]: one number.

    The number is a mean over the batch (BCE) and over its pairs (PWiseR), so the reduction is
    SUM: there is nothing left to average.
    """

    def __init__(self, task: str, config: LossConfig):
        super().__init__(reduction=keras.losses.Reduction.SUM, name=f"{task}_loss")
        self._positive_grade = POSITIVE_GRADE[task]
        self._config = config
        self._pwiser = PWiseRLoss(config.margin_click, config.margin_nonclick, from_logits=True)

    def call(self, grade: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        if isinstance(grade, dict):
            grade, logits = grade["grade"], logits["logits"]
        labels = tf.cast(grade >= self._positive_grade, logits.dtype)
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
        if self._config.conversion_weight != 1:
            # As if each such row stood in the batch so many times: the mean divides by all of them.
            weights = tf.where(grade == CONVERSION, self._config.conversion_weight, 1.0)
            loss = tf.reduce_sum(weights * losses) / tf.reduce_sum(weights)
        else:
            loss = tf.reduce_mean(losses)
        if self._config.pwiser_weight:
            loss += self._config.pwiser_weight * self._pwiser(grade, logits)
        return loss
