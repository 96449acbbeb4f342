"""Shared by all architectures: the two towers and their heads, the tasks, and the outputs.

An architecture is a subclass that computes the inputs of the two towers. The output of the first
tower is the probability of a click. The output of the second has two versions (`conversion_head`):

    direct   its sigmoid q is P(click and conversion | exposure), learnt over all exposures;
             served as ctcvr = min(q, ctr), cvr = ctcvr / ctr        (PWiseR's paper, MTReclib)
    product  its sigmoid is P(conversion | click); it is learnt through ctcvr = ctr * cvr    (ESMM)
"""

import dataclasses
import math

import tensorflow as tf
import tensorflow_recommenders as tfrs
import tf_keras as keras

from pwiser_tf.calibration import Calibration
from pwiser_tf.click_noise import ClickNoise
from pwiser_tf.errors import DataError
from pwiser_tf.layers import MLP, AccidentalClicks, Encoder, Head, observed_logits
from pwiser_tf.options import check, option
from pwiser_tf.schema import Schema
from pwiser_tf.tasks import LOSSES, TASKS, LossConfig, Task

CLICK, CONVERSION = TOWERS = ("click", "conversion")
CONVERSION_HEADS = ("direct", "product")
# The attributes of a model that hold the running means of its losses.
RUNNING_MEANS = ("_tasks", "_means")
# The tower of each task. With the product head, CTCVR also uses the click tower.
TOWER_OF_TASK = {"ctr": CLICK, "ctcvr": CONVERSION}


# The architectures, by the name that --model takes; models/__init__.py fills it.
MODELS: dict[str, type["ClickConversionModel"]] = {}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture and its sizes; the defaults are MTReclib's.

    Raises:
      DataError: values that the architecture does not support.
    """

    name: str = option("mmoe", "The architecture.", flag="model", choices=MODELS)
    conversion_head: str | None = option(
        None,
        "What the second tower learns. direct: P(click and conversion | exposure); product: "
        "P(conversion | click), learnt through ctcvr = ctr * cvr. Default: as in the paper of the "
        "architecture (product for esmm and escm2, otherwise direct).",
        choices=CONVERSION_HEADS,
    )
    embedding_dim: int = option(128, "The size of an embedding.", low=1)
    bottom_units: tuple[int, ...] = option(
        (512, 256), "Layer sizes of a bottom MLP or an expert.", low=1
    )
    tower_units: tuple[int, ...] = option((128, 64), "Layer sizes of a tower.", low=1)
    experts: int = option(
        8, "The number of experts for each tower; in ple and stem half of them are shared.", low=1
    )
    critics: int = option(5, "The number of critics of metaheac.", low=1)
    dropout: float = option(0.2, "The dropout rate.", low=0.0, high=0.99)
    weight_decay: float = option(
        1e-6, "L2 regularization of embeddings and dense kernels.", low=0.0
    )
    auxiliary_weight: float | None = option(
        None,
        "The weight of an architecture's auxiliary loss, relative to the mean weight of the tasks: "
        "the calibrator of aitm (default 0.6, as in the paper), the CVR risk of escm2 (0.5).",
        low=0.0,
    )
    mixed_precision: bool = option(
        False,
        "Train with bfloat16 matrix products, which are faster on processors that support them "
        "(AMX, AVX512-BF16, GPU). The exported model is always float32.",
    )

    def __post_init__(self):
        check(self)
        architecture = MODELS[self.name]
        if self.conversion_head is None:
            object.__setattr__(self, "conversion_head", architecture.conversion_heads[0])
        if self.auxiliary_weight is None:
            object.__setattr__(self, "auxiliary_weight", architecture.auxiliary_weight or 0.0)
        architecture.check_config(self)


class ClickConversionModel(tfrs.Model):
    """Base of the architectures. Called with features (see data.batches), it gives probabilities.

    A subclass builds its layers in __init__ and defines `tower_inputs`, or `tower_logits` instead.
    It may also set these class attributes:

      conversion_heads: the heads that its paper allows; the first is the default.
      auxiliary_weight: the default weight of its `auxiliary_loss`, or None if it has none.
      towers: the towers that get an input from `tower_inputs`.
      options: the fields of ModelConfig that it reads and some other architectures do not.

    Args:
      schema: the schema of the data set.
      config: the sizes.
      loss: the losses of the tasks; needed for training, not for prediction.

    Attributes:
      calibration: scales the outputs, except in training; None: they are as they were learnt.
    """

    conversion_heads: tuple[str, ...] = CONVERSION_HEADS
    auxiliary_weight: float | None = None
    towers: tuple[str, ...] = TOWERS
    options: tuple[str, ...] = ()
    needs_conversions: bool = False

    def __init__(
        self,
        schema: Schema,
        config: ModelConfig,
        loss: LossConfig | None = None,
    ):
        super().__init__()
        self.calibration: Calibration | None = None
        if schema.conversion is None:
            # CTR only: one tower, one task, one output.
            if self.needs_conversions:
                able = [name for name, model in MODELS.items() if not model.needs_conversions]
                raise DataError(
                    f"--model={config.name} learns from conversions, which the data set does not "
                    f"have: choose one of {', '.join(able)}"
                )
            self.towers = (CLICK,)
            loss = loss and loss.without_conversions()
        self._schema = schema
        self._config = config
        self._loss = loss
        tasks = () if not loss else TASKS if schema.conversion else ("ctr",)
        self._rates = _base_rates(schema, config.conversion_head)
        self._energies = {
            TOWER_OF_TASK[task] for task in tasks if LOSSES[loss.loss_of(task)].needs_energy
        }
        self._towers = {tower: self._mlp(config.tower_units) for tower in self.towers}
        self._heads = {tower: self._head(tower) for tower in self.towers}
        self._tasks = {name: Task(name, loss) for name in tasks}
        of_batch = ["loss", "regularization_loss", "total_loss"]
        if self.auxiliary_weight is not None:
            of_batch.append("auxiliary_loss")
        self._means = {name: keras.metrics.Mean(name) for name in of_batch} if tasks else {}
        self._accidental_clicks: AccidentalClicks | None = None

    @classmethod
    def check_config(cls, config: ModelConfig) -> None:
        """Raises DataError for a config that the architecture does not support."""
        if config.conversion_head not in cls.conversion_heads:
            raise DataError(
                f"--conversion_head={config.conversion_head}: --model={config.name} only "
                f"supports {' or '.join(cls.conversion_heads)}"
            )
        if config.auxiliary_weight and cls.auxiliary_weight is None:
            raise DataError(
                f"--auxiliary_weight={config.auxiliary_weight}: --model={config.name} has no "
                "auxiliary loss"
            )

    def correct_clicks(self, noise: ClickNoise) -> None:
        """Makes the click tower learn genuine clicks: the output `interest` (see click_noise)."""
        self._accidental_clicks = AccidentalClicks(noise, self._schema)

    def tower_inputs(self, features: dict[str, tf.Tensor], training: bool) -> dict[str, tf.Tensor]:
        """Features to {tower: float32 [B, units]}, for each of `towers`."""
        raise NotImplementedError

    def tower_logits(self, features: dict[str, tf.Tensor], training: bool) -> dict[str, tf.Tensor]:
        """Features to {tower: float32 [B, width]}, for both TOWERS and any additional towers.

        Column 0 is the logit. If a task of the tower has the loss JRC, column 1 is the energy: the
        class logits (f0, f1) are (energy, energy + logit). The energy is used only by the loss.
        """
        inputs = self.tower_inputs(features, training)
        return {
            tower: self._heads[tower](self._towers[tower](inputs[tower], training))
            for tower in self.towers
        }

    def auxiliary_loss(self, logits: dict[str, tf.Tensor], grade: tf.Tensor) -> tf.Tensor:
        """The outputs of `tower_logits` and grades [B] to the auxiliary loss, a scalar."""
        raise NotImplementedError

    def call(self, features: dict[str, tf.Tensor], training: bool = False) -> dict[str, tf.Tensor]:
        """Features to probabilities {"ctr", "cvr", "ctcvr"}, float32 [B], ctcvr = ctr * cvr; to
        {"ctr"} if the data set has no conversions. With `correct_clicks`, "interest" is added.
        Calibrated, except in training."""
        outputs = self._uncalibrated(features, training)
        if training or self.calibration is None:
            return outputs
        return self.calibration.apply(outputs)

    def _uncalibrated(self, features: dict[str, tf.Tensor], training: bool) -> dict[str, tf.Tensor]:
        """The outputs of `call` as they were learnt."""
        genuine = self.tower_logits(features, training)
        logits = self._observed(genuine, features)
        click = logits[CLICK][:, 0]
        outputs = {"ctr": tf.sigmoid(click)}
        if CONVERSION in logits:
            # In log space, which is also defined if ctr underflows.
            log_cvr = tf.math.log_sigmoid(logits[CONVERSION][:, 0])
            if self._config.conversion_head == "product":
                # Only a genuine click converts.
                log_genuine = tf.math.log_sigmoid(genuine[CLICK][:, 0])
                log_cvr += log_genuine - tf.math.log_sigmoid(click)
            else:
                log_cvr -= tf.math.log_sigmoid(click)
            cvr = tf.exp(tf.minimum(log_cvr, 0.0))
            outputs |= {"cvr": cvr, "ctcvr": outputs["ctr"] * cvr}
        if self._accidental_clicks:
            outputs["interest"] = tf.sigmoid(genuine[CLICK][:, 0])
        return outputs

    def _observed(
        self, logits: dict[str, tf.Tensor], features: dict[str, tf.Tensor]
    ) -> dict[str, tf.Tensor]:
        """The outputs of `tower_logits`, with the logit of P(click) for that of interest."""
        if not self._accidental_clicks:
            return logits
        accidental = self._accidental_clicks(features)
        click = observed_logits(logits[CLICK][:, :1], accidental[:, tf.newaxis])
        return {**logits, CLICK: tf.concat([click, logits[CLICK][:, 1:]], axis=1)}

    def train_step(self, inputs) -> dict[str, tf.Tensor]:
        """A step of tfrs.Model that returns the mean losses of the epoch, not of the batch."""
        of_batch = super().train_step(inputs)
        for name in ("loss", "regularization_loss", "total_loss"):
            self._means[name].update_state(of_batch[name])
        return {metric.name: metric.result() for metric in self.metrics}

    def compute_loss(self, inputs, training: bool = False) -> tf.Tensor:
        """The loss of a batch (features, grade), a scalar.

        It is the sum of weight * loss over the tasks, plus the auxiliary loss, if there is one. In
        the papers with an auxiliary loss every task has weight 1. So the auxiliary loss is scaled
        by the mean weight of the tasks: with the default weights of 0.5 the sum is half of the
        paper's.
        """
        features, grade = inputs
        genuine = self.tower_logits(features, training)
        logits = self._observed(genuine, features)
        predictions = self._task_predictions(logits, genuine)
        labels = {"grade": grade}
        if "group" in features:
            labels["group"] = features["group"]
        terms = [
            self._loss.weight_of(name) * task(labels=labels, predictions=predictions[name])
            for name, task in self._tasks.items()
        ]
        if self.auxiliary_weight is not None:
            auxiliary = self.auxiliary_loss(logits, grade)
            self._means["auxiliary_loss"].update_state(auxiliary)
            mean_weight = sum(map(self._loss.weight_of, self._tasks)) / len(self._tasks)
            scale = self._config.auxiliary_weight * mean_weight
            terms.append(scale * auxiliary)
        return tf.add_n(terms)

    def _task_predictions(
        self, logits: dict[str, tf.Tensor], genuine: dict[str, tf.Tensor]
    ) -> dict[str, dict[str, tf.Tensor]]:
        """The inputs of each task's loss: {task: {"logits": [B], "energy": [B]}}.

        Args:
          logits, genuine: the outputs of `tower_logits` with and without accidental clicks.
        """
        predictions = {}
        for task in self._tasks:
            tower = TOWER_OF_TASK[task]
            predictions[task] = {"logits": logits[tower][:, 0]}
            if tower in self._energies:
                predictions[task]["energy"] = logits[tower][:, 1]
        if "ctcvr" in predictions and self._config.conversion_head == "product":
            # Only a genuine click converts.
            click, conversion = (genuine[tower][:, 0] for tower in TOWERS)
            predictions["ctcvr"]["logits"] = _logit_of_product(click, conversion)
        return predictions

    def _encoder(self) -> Encoder:
        return Encoder(self._schema, self._config.embedding_dim, self._config.weight_decay)

    def _mlp(self, units: tuple[int, ...]) -> MLP:
        config = self._config
        return MLP(units, config.dropout, config.weight_decay, config.mixed_precision)

    def _head(self, tower: str) -> Head:
        # The bias starts at the base rate, so the model is calibrated from the first step. From 1/2
        # it would need hundreds of steps to get there.
        bias = log_odds(self._rates[tower]) if tower in self._rates else 0.0
        return Head(bias, self._config.weight_decay, energy=tower in self._energies)


def _base_rates(schema: Schema, conversion_head: str) -> dict[str, tuple[int, int]]:
    """The base rate of each tower's label in the training split: {tower: (positives, rows)}."""
    if "train" not in schema.splits:
        return dict.fromkeys(TOWERS, (0, 0))
    split = schema.splits["train"]
    converted_of = split.clicks if conversion_head == "product" else split.rows
    return {CLICK: (split.clicks, split.rows), CONVERSION: (split.conversions, converted_of)}


def log_odds(rate: tuple[int, int]) -> float:
    """The logit of a rate given as (positives, rows)."""
    positives, rows = rate
    # The half rows keep the result finite without positives or without negatives.
    return math.log((positives + 0.5) / (rows - positives + 0.5))


def _logit_of_product(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """The logit of sigmoid(a) * sigmoid(b), computed in log space.

    1 - pq = (1 - p) + p (1 - q): this sum keeps precision and gradients if pq is close to 1.
    """
    log_p, log_q = tf.math.log_sigmoid(a), tf.math.log_sigmoid(b)
    log_rest = tf.reduce_logsumexp([tf.math.log_sigmoid(-a), log_p + tf.math.log_sigmoid(-b)], 0)
    return log_p + log_q - log_rest
