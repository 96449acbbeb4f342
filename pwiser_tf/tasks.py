"""Tasks: what a tower learns. A task has a name, a label, a loss and a weight.

Every task here is defined on all exposures. Its label is 1 if the row's grade reaches a threshold.
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
# The label of a task is 1 if the grade is at least this.
POSITIVE_GRADE = {"ctr": 1, "ctcvr": CONVERSION}
TASKS = tuple(POSITIVE_GRADE)

SCORE_SPACES = ("probability", "logit")


@dataclasses.dataclass(frozen=True)
class Batch:
    """The inputs of a loss for one batch, each [B].

    Attributes:
      logits: float32, the logits of the task.
      positive: float32, the label of the task.
      grade: int64.
      group: int64, or None if the data has no groups.
      energy: float32, or None if the loss does not need it.
    """

    logits: tf.Tensor
    positive: tf.Tensor
    grade: tf.Tensor
    group: tf.Tensor | None
    energy: tf.Tensor | None


@dataclasses.dataclass(frozen=True)
class LossEntry:
    """A loss: a term that is added to cross-entropy, or a replacement of cross-entropy.

    Attributes:
      formula: a text for messages, with the names of options in braces.
      term: gives a scalar for a batch. It is added to cross-entropy, multiplied by the option that
        `weight` names.
      of_rows: gives one value per row, [B]. It replaces cross-entropy.
      weight: the name of the option with the weight of the term.
      options: the options that this loss reads and some other losses do not.
      needs_conversions: it compares conversions with other rows: without any it is BCE.
      needs_groups: it compares the rows of one group, so it needs `Batch.group`.
      needs_energy: it needs `Batch.energy`, a second output of the task's tower.
    """

    formula: str
    term: Callable[["LossConfig", Batch], tf.Tensor] | None = None
    of_rows: Callable[["LossConfig", Batch], tf.Tensor] | None = None
    weight: str = "ranking_weight"
    options: tuple[str, ...] = ("loss_tasks", "ranking_weight")
    needs_conversions: bool = False
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
        needs_conversions=True,
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
    """The loss of the tasks and its settings."""

    name: str = option(
        "pwiser",
        "The loss of the tasks in --loss_tasks. bce: binary cross-entropy; pwiser: BCE + "
        "pwiser_weight * PWiseR; ranknet, combined_pair, jrc, listce: BCE + ranking_weight * that "
        "term; focal: focal loss instead of BCE.",
        flag="loss",
        choices=LOSSES,
    )
    loss_tasks: tuple[str, ...] = option(
        TASKS,
        "The tasks that use --loss; the others use bce.",
        choices=TASKS,
    )
    ctr_weight: float = option(0.5, "Weight of the CTR task's loss.", low=0.0)
    ctcvr_weight: float = option(0.5, "Weight of the CTCVR task's loss.", low=0.0)
    conversion_weight: float = option(
        1.0, "Weight of a row with a conversion in BCE.", low=0.0, search=(1.0, 30.0, True)
    )
    pwiser_weight: float = option(
        0.1, "The weight lambda in BCE + lambda * PWiseR.", low=0.0, search=(3e-3, 3.0, True)
    )
    margin_click: float = option(
        0.05,
        "PWiseR's margin between a conversion and a click without conversion.",
        low=0.0,
        search=(5e-3, 0.5, True),
    )
    margin_nonclick: float = option(
        0.1,
        "PWiseR's margin between a conversion and an exposure without click.",
        low=0.0,
        search=(5e-3, 0.5, True),
    )
    score_space: str = option(
        SCORE_SPACES[0],
        "The scores that PWiseR compares, and so the unit of its margins.",
        choices=SCORE_SPACES,
    )
    normalization: str = option(
        losses.NORMALIZATIONS[0],
        "What PWiseR divides each of its two sums by. pairs: the number of pairs; negatives: the "
        "number of lower-graded rows, as printed in the paper (the loss then grows with the number "
        "of conversions in the batch).",
        choices=losses.NORMALIZATIONS,
    )
    click_noise_fields: tuple[str, ...] = option(
        (),
        "Categorical features that say how an exposure was shown, such as slot and device. "
        "Accidental clicks that depend on them are estimated from the training counts, and the "
        "output interest is added: P(genuine click).",
    )
    ranking_weight: float = option(
        0.1,
        "The weight of the term of ranknet, combined_pair, jrc, listce.",
        low=0.0,
        search=(3e-3, 3.0, True),
    )
    focal_gamma: float = option(
        2.0, "The exponent of the focal loss.", low=0.0, search=(0.0, 5.0, False)
    )

    def __post_init__(self):
        check(self)

    def loss_of(self, task: str) -> str:
        """The loss of a task, a name in LOSSES."""
        return self.name if task in self.loss_tasks else "bce"

    def without_conversions(self) -> "LossConfig":
        """The loss of data with CTR only: its one task, and BCE in place of a loss that compares
        conversions."""
        tasks = tuple(task for task in self.loss_tasks if task == "ctr")
        name = "bce" if LOSSES[self.name].needs_conversions or not tasks else self.name
        # No row has a conversion, whatever it would weigh.
        return dataclasses.replace(self, name=name, loss_tasks=tasks, conversion_weight=1.0)

    @property
    def is_cross_entropy(self) -> bool:
        """Whether every task learns by cross-entropy alone, in which each row has weight 1."""
        entry = LOSSES[self.name]
        changes = entry.of_rows or (entry.term and getattr(self, entry.weight))
        return self.conversion_weight == 1 and not (changes and self.loss_tasks)

    def weight_of(self, task: str) -> float:
        """The weight of a task's loss in the sum over the tasks."""
        return getattr(self, f"{task}_weight")


class Task(keras.layers.Layer, tfrs.tasks.Task):
    """A task: computes the loss of its tower's logits on a batch, and epoch means of it.

    Its metrics are `{name}_loss`; `{name}_cross_entropy`, the BCE of the label whatever the loss
    is, so that runs with different losses can be compared; and `{name}_ranking`, the term of the
    loss without its weight, if the loss has a term.

    Call: labels {"grade": int64 [B], "group": int64 [B] if the data has groups} and predictions
    {"logits": float32 [B], "energy": float32 [B] if the loss is jrc} to the loss, a scalar.

    Raises:
      ValueError: when called without groups, if the loss needs them.
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
            # As if the row were in the batch this many times: the mean divides by all weights.
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
