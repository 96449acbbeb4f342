"""Tasks: what a tower learns. A task is a name, the label it learns, its loss and its weight.

Every task here is defined on all exposures; its label is 1 where the row's grade is high enough.
A new loss is a function in `losses` and an entry in `LOSSES`.
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf
import tensorflow_recommenders as tfrs
import tf_keras as keras

from pwiser_tf import losses
from pwiser_tf.options import check, option

CONVERSION = 2
# The label of a task is 1 where the grade reaches this.
POSITIVE_GRADE = {"ctr": 1, "ctcvr": CONVERSION}
TASKS = tuple(POSITIVE_GRADE)

SCORE_SPACES = ("probability", "logit")


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
    term: Callable[["LossConfig", Batch], tf.Tensor] | None = None
    of_rows: Callable[["LossConfig", Batch], tf.Tensor] | None = None
    weight: str = "ranking_weight"
    options: tuple[str, ...] = ("loss_tasks", "ranking_weight")
    needs_groups: bool = False
    needs_energy: bool = False


def _pwiser(config: "LossConfig", batch: Batch) -> tf.Tensor:
    probability = config.score_space == "probability"
    scores = tf.sigmoid(batch.logits) if probability else batch.logits
    return losses.pwiser(
        scores, batch.grade, config.margin_click, config.margin_nonclick, config.normalization
    )


LOSSES = {
    "bce": LossEntry("BCE", options=()),
    "pwiser": LossEntry(
        "BCE + {pwiser_weight:g} x PWiseR",
        term=_pwiser,
        weight="pwiser_weight",
        options=(
            "loss_tasks",
            "pwiser_weight",
            "margin_click",
            "margin_nonclick",
            "score_space",
            "normalization",
        ),
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


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How the tasks are learnt."""

    name: str = option(
        "pwiser",
        "How the tasks of --loss_tasks are learnt: bce, binary cross-entropy alone; pwiser, BCE + "
        "pwiser_weight * PWiseR; ranknet, combined_pair, jrc, listce, BCE + ranking_weight * that "
        "term; focal, instead of BCE.",
        flag="loss",
        choices=LOSSES,
    )
    loss_tasks: tuple[str, ...] = option(
        TASKS,
        "The tasks that are learnt with --loss; the others are learnt with bce.",
        choices=TASKS,
    )
    ctr_weight: float = option(0.5, "Weight of the CTR task's loss.", low=0.0)
    ctcvr_weight: float = option(0.5, "Weight of the CTCVR task's loss.", low=0.0)
    conversion_weight: float = option(
        1.0, "Weight of a row with a conversion in BCE.", low=0.0, search=(1.0, 30.0, True)
    )
    pwiser_weight: float = option(
        0.1, "Lambda in BCE + lambda * PWiseR.", low=0.0, search=(3e-3, 3.0, True)
    )
    margin_click: float = option(
        0.05, "PWiseR's margin of conversions over clicks.", low=0.0, search=(5e-3, 0.5, True)
    )
    margin_nonclick: float = option(
        0.1, "PWiseR's margin of conversions over exposures.", low=0.0, search=(5e-3, 0.5, True)
    )
    score_space: str = option(
        SCORE_SPACES[0], "What PWiseR's margins are measured in.", choices=SCORE_SPACES
    )
    normalization: str = option(
        losses.NORMALIZATIONS[0],
        "What PWiseR divides each of its two sums by: its pairs, or its lower-graded rows, as the "
        "paper prints it (the loss then grows with the conversions in the batch).",
        choices=losses.NORMALIZATIONS,
    )
    ranking_weight: float = option(
        0.1, "Lambda of ranknet, combined_pair, jrc, listce.", low=0.0, search=(3e-3, 3.0, True)
    )
    focal_gamma: float = option(
        2.0, "The exponent of the focal loss.", low=0.0, search=(0.0, 5.0, False)
    )

    def __post_init__(self):
        check(self)

    def loss_of(self, task: str) -> str:
        """The loss of a task, a name in LOSSES."""
        return self.name if task in self.loss_tasks else "bce"

    def weight_of(self, task: str) -> float:
        """The weight of a task's loss in the sum over the tasks."""
        return getattr(self, f"{task}_weight")


class Task(keras.layers.Layer, tfrs.tasks.Task):
    """A task: the loss of its tower's logits on a batch, and its means over an epoch.

    Its metrics are `{name}_loss`; `{name}_cross_entropy`, of the plain label whatever the loss is,
    so that runs of different losses compare; and `{name}_ranking`, the loss's term without its
    weight, where the loss has one.

    Call: labels {"grade": int64 [B], "group": int64 [B] where the data has one} and predictions
    {"logits": float32 [B], "energy": float32 [B] where the loss is jrc} to the loss, a scalar.

    Raises:
      ValueError: when called, a loss that needs groups without them.
    """

    def __init__(self, name: str, config: LossConfig):
        super().__init__(name=f"{name}_task")
        self._positive_grade = POSITIVE_GRADE[name]
        self._config = config
        self._entry = LOSSES[config.loss_of(name)]
        self._term_weight = getattr(config, self._entry.weight) if self._entry.term else 0.0
        kinds = ("loss", "cross_entropy", *(("ranking",) if self._term_weight else ()))
        self._means = {kind: keras.metrics.Mean(f"{name}_{kind}") for kind in kinds}

    def call(self, labels: dict[str, tf.Tensor], predictions: dict[str, tf.Tensor]) -> tf.Tensor:
        config, entry = self._config, self._entry
        grade, logits = labels["grade"], predictions["logits"]
        positive = tf.cast(grade >= self._positive_grade, logits.dtype)
        batch = Batch(logits, positive, grade, labels.get("group"), predictions.get("energy"))
        cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits(positive, logits)
        of_rows = entry.of_rows(config, batch) if entry.of_rows else cross_entropy
        if config.conversion_weight != 1:
            # As if the row stood in the batch this many times: the mean divides by all of them.
            weights = tf.where(grade == CONVERSION, config.conversion_weight, 1.0)
            loss = tf.reduce_sum(weights * of_rows) / tf.reduce_sum(weights)
        else:
            loss = tf.reduce_mean(of_rows)
        if self._term_weight:
            if entry.needs_groups and batch.group is None:
                raise ValueError(
                    f"loss {config.name!r} compares the rows of one group: expected 'group' among "
                    f"the labels, found {sorted(labels)}"
                )
            term = entry.term(config, batch)
            self._means["ranking"].update_state(term)
            loss += self._term_weight * term
        self._means["loss"].update_state(loss)
        self._means["cross_entropy"].update_state(tf.reduce_mean(cross_entropy))
        return loss
