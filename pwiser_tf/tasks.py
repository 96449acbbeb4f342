"""Tasks: what a tower learns. A task is a name, the label it learns, its loss and its weight.

Every task here is defined on all exposures; its label is 1 where the row's grade is high enough.
A new loss is a function in `losses` and an entry in `LOSSES`.
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf
import tf_keras as keras

from pwiser_tf import losses

CONVERSION = 2
# The label of a task is 1 where the grade reaches this.
POSITIVE_GRADE = {"ctr": 1, "ctcvr": CONVERSION}
TASKS = tuple(POSITIVE_GRADE)

SCORE_SPACES = ("probability", "logit")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How a task is learnt.

    Attributes:
      weight: the task's share in the sum over tasks.
      conversion_weight: rows with a conversion count so many times in BCE (or focal).
      loss: one of LOSSES, below.
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
        for name, names in (("loss", tuple(LOSSES)), ("score_space", SCORE_SPACES)):
            if getattr(self, name) not in names:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected one of {names}")


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a loss sees of a batch, all [B].

    Attributes:
      logits: float32, the task's. positive: float32, 1 where the row has the task's label.
      grade: int64. group: int64, None where the data has none. energy: float32, of losses that
      need it.
    """

    logits: tf.Tensor
    positive: tf.Tensor
    grade: tf.Tensor
    group: tf.Tensor | None
    energy: tf.Tensor | None


@dataclasses.dataclass(frozen=True)
class LossEntry:
    """A loss: what it adds to cross-entropy, or what it puts in its place.

    Attributes:
      formula: in words, with its options in braces.
      term: a batch's number, added with the weight that the option `weight` holds.
      of_rows: each row's number [B], in the place of cross-entropy.
      weight: the option that holds the weight of the term.
      options: the options that it reads and others do not; what plain BCE reads all read.
      needs_groups: it compares the rows of one group, and needs to know it.
      needs_energy: it needs a second number a row of the task's tower.
    """

    formula: str
    term: Callable[[LossConfig, Batch], tf.Tensor] | None = None
    of_rows: Callable[[LossConfig, Batch], tf.Tensor] | None = None
    weight: str = "ranking_weight"
    options: tuple[str, ...] = ("loss_tasks", "ranking_weight")
    needs_groups: bool = False
    needs_energy: bool = False


def _pwiser(config: LossConfig, batch: Batch) -> tf.Tensor:
    probability = config.score_space == "probability"
    scores = tf.sigmoid(batch.logits) if probability else batch.logits
    return losses.pwiser(scores, batch.grade, config.margin_click, config.margin_nonclick)


LOSSES = {
    "bce": LossEntry("BCE", options=()),
    "pwiser": LossEntry(
        "BCE + {pwiser_weight:g} x PWiseR",
        term=_pwiser,
        weight="pwiser_weight",
        options=("loss_tasks", "pwiser_weight", "margin_click", "margin_nonclick", "score_space"),
    ),
    "ranknet": LossEntry(
        "BCE + {ranking_weight:g} x ranknet",
        term=lambda _, batch: losses.pairwise_logistic(batch.logits, batch.grade),
    ),
    "combined_pair": LossEntry(
        "BCE + {ranking_weight:g} x combined_pair",
        term=lambda _, batch: losses.combined_pair(batch.logits, batch.positive),
    ),
    "jrc": LossEntry(
        "BCE + {ranking_weight:g} x jrc",
        term=lambda _, batch: losses.jrc(batch.logits, batch.energy, batch.positive, batch.group),
        needs_groups=True,
        needs_energy=True,
    ),
    "listce": LossEntry(
        "BCE + {ranking_weight:g} x listce",
        term=lambda _, batch: losses.listce(batch.logits, batch.positive, batch.group),
        needs_groups=True,
    ),
    "focal": LossEntry(
        "focal, gamma {focal_gamma:g}",
        of_rows=lambda config, batch: losses.focal(
            batch.logits, batch.positive, config.focal_gamma
        ),
        options=("loss_tasks", "focal_gamma"),
    ),
}


class TaskLoss(keras.losses.Loss):
    """The loss of one task, from a batch's grades and its logits: one number.

    Called with y_true {"grade": int64 [B], "group": int64 [B] where the data has one} and y_pred
    {"logits": float32 [B], "energy": float32 [B] where the loss is jrc}. The number is a mean over
    rows (BCE, focal) and one over pairs, rows or groups (the term), so the reduction is SUM: there
    is nothing left to average.

    Raises:
      ValueError: when called, a loss that needs groups without them.
    """

    def __init__(self, task: str, config: LossConfig):
        super().__init__(reduction=keras.losses.Reduction.SUM, name=f"{task}_loss")
        self._positive_grade = POSITIVE_GRADE[task]
        self._config = config

    def call(self, labels: dict[str, tf.Tensor], predictions: dict[str, tf.Tensor]) -> tf.Tensor:
        config, entry = self._config, LOSSES[self._config.loss]
        grade, logits = labels["grade"], predictions["logits"]
        positive = tf.cast(grade >= self._positive_grade, logits.dtype)
        batch = Batch(logits, positive, grade, labels.get("group"), predictions.get("energy"))
        if entry.of_rows:
            of_rows = entry.of_rows(config, batch)
        else:
            of_rows = tf.nn.sigmoid_cross_entropy_with_logits(positive, logits)
        if config.conversion_weight != 1:
            # As if each such row stood in the batch so many times: the mean divides by all of them.
            weights = tf.where(grade == CONVERSION, config.conversion_weight, 1.0)
            loss = tf.reduce_sum(weights * of_rows) / tf.reduce_sum(weights)
        else:
            loss = tf.reduce_mean(of_rows)
        term_weight = getattr(config, entry.weight)
        if entry.term is None or not term_weight:
            return loss
        if entry.needs_groups and batch.group is None:
            raise ValueError(
                f"loss {config.loss!r} compares the rows of one group: expected 'group' among the "
                f"labels, found {sorted(labels)}"
            )
        return loss + term_weight * entry.term(config, batch)
