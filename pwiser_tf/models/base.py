"""What all architectures share: the two towers, the two heads, the tasks, and the outputs.

An architecture is a subclass that says how the inputs of the two towers are made. The first tower
is read as the probability of a click. The second is read in one of two ways (`conversion_head`):

    direct   its sigmoid q is P(click and conversion | exposure), learnt over all exposures;
             served as ctcvr = min(q, ctr), cvr = ctcvr / ctr        (PWiseR's paper, MTReclib)
    product  its sigmoid is P(conversion | click), and ctcvr = ctr * cvr is what is learnt  (ESMM)
"""

import dataclasses
import math

import tensorflow as tf
import tensorflow_recommenders as tfrs
import tf_keras as keras

from pwiser_tf.layers import MLP, Encoder, Head
from pwiser_tf.schema import Schema
from pwiser_tf.tasks import LOSSES, LossConfig, TaskLoss

CLICK, CONVERSION = TOWERS = ("click", "conversion")
CONVERSION_HEADS = ("direct", "product")
# The tower whose output a task reads first.
TOWER_OF_TASK = {"ctr": CLICK, "ctcvr": CONVERSION}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model; the defaults are MTReclib's.

    Attributes:
      embedding_dim: size of an embedding. bottom_units: MLP sizes of a bottom or expert.
      tower_units: MLP sizes of a tower. experts: how many, where the architecture has them.
      critics: how many, for MetaHeac. dropout: rate, in every block.
      weight_decay: L2 on embeddings and dense kernels.
      mixed_precision: train with bfloat16 matrix products (see layers.Block).
      conversion_head: "direct" or "product" (see above).
      auxiliary_weight: of the architecture's own extra term, where it has one; else 0.
    """

    embedding_dim: int = 128
    bottom_units: tuple[int, ...] = (512, 256)
    tower_units: tuple[int, ...] = (128, 64)
    experts: int = 8
    critics: int = 5
    dropout: float = 0.2
    weight_decay: float = 1e-6
    mixed_precision: bool = False
    conversion_head: str = "direct"
    auxiliary_weight: float = 0.0

    def __post_init__(self):
        if self.conversion_head not in CONVERSION_HEADS:
            raise ValueError(f"conversion_head: {self.conversion_head}, not of {CONVERSION_HEADS}")


class ClickConversionModel(tfrs.Model):
    """Base of the architectures. Called with features (see data.batches), it gives probabilities.

    A subclass builds its layers in __init__ and defines `tower_inputs`, or else `tower_logits`.
    What it may state besides, as class attributes:

      conversion_heads: the heads that its paper leaves open; the first is the default.
      auxiliary_weight: None, or the weight in its paper of a term of its own, `auxiliary_loss`.
      towers: the towers that `tower_inputs` feeds.
      options: the fields of ModelConfig that it reads and some others do not.

    Args:
      schema: the data set's; config: the sizes.
      losses: how each task is learnt, by its name; needed to train, not to predict.

    Raises:
      ValueError: a config that the architecture cannot have.
    """

    conversion_heads: tuple[str, ...] = CONVERSION_HEADS
    auxiliary_weight: float | None = None
    towers: tuple[str, ...] = TOWERS
    options: tuple[str, ...] = ()

    def __init__(
        self,
        schema: Schema,
        config: ModelConfig,
        losses: dict[str, LossConfig] | None = None,
    ):
        super().__init__()
        if config.conversion_head not in self.conversion_heads:
            raise ValueError(
                f"conversion_head: {config.conversion_head}, {type(self).__name__} has "
                + " or ".join(self.conversion_heads)
            )
        if config.auxiliary_weight and self.auxiliary_weight is None:
            raise ValueError(
                f"auxiliary_weight: {config.auxiliary_weight}, {type(self).__name__} has no "
                "auxiliary loss"
            )
        self._schema = schema
        self._config = config
        self._task_losses = dict(losses or {})
        self._rates = _base_rates(schema, config.conversion_head)
        self._energies = {
            TOWER_OF_TASK[task]
            for task, loss in self._task_losses.items()
            if LOSSES[loss.loss].needs_energy
        }
        self._towers = {tower: self._mlp(config.tower_units) for tower in self.towers}
        self._heads = {tower: self._head(tower) for tower in self.towers}
        self._tasks = {
            name: tfrs.tasks.Ranking(
                loss=TaskLoss(name, loss), loss_metrics=[keras.metrics.Mean(f"{name}_loss")]
            )
            for name, loss in self._task_losses.items()
        }
        if self.auxiliary_weight is not None:
            self._auxiliary_metric = keras.metrics.Mean("auxiliary_loss")

    def tower_inputs(self, features: dict[str, tf.Tensor], training: bool) -> dict[str, tf.Tensor]:
        """Features to {tower: float32 [B, units]}, for all of `towers`."""
        raise NotImplementedError

    def tower_logits(self, features: dict[str, tf.Tensor], training: bool) -> dict[str, tf.Tensor]:
        """Features to {tower: float32 [B, width]}, for both TOWERS and what else there is.

        Column 0 is the logit. The second column, where a task of the tower is learnt by JRC, is
        the energy: class logits (f0, f1) are (energy, energy + logit). It shapes the loss alone.
        """
        inputs = self.tower_inputs(features, training)
        return {
            tower: self._heads[tower](self._towers[tower](inputs[tower], training))
            for tower in self.towers
        }

    def auxiliary_loss(self, logits: dict[str, tf.Tensor], grade: tf.Tensor) -> tf.Tensor:
        """What `tower_logits` gave, and grades [B], to the architecture's own term, a scalar."""
        raise NotImplementedError

    def call(self, features: dict[str, tf.Tensor], training: bool = False) -> dict[str, tf.Tensor]:
        """Features to probabilities {"ctr", "cvr", "ctcvr"}, float32 [B], ctcvr = ctr * cvr."""
        logits = self.tower_logits(features, training)
        click, conversion = (logits[tower][:, 0] for tower in TOWERS)
        ctr = tf.sigmoid(click)
        if self._config.conversion_head == "product":
            cvr = tf.sigmoid(conversion)
        else:
            # min(q, ctr) / ctr, which stays defined where ctr underflows.
            log_ratio = tf.math.log_sigmoid(conversion) - tf.math.log_sigmoid(click)
            cvr = tf.exp(tf.minimum(log_ratio, 0.0))
        return {"ctr": ctr, "cvr": cvr, "ctcvr": ctr * cvr}

    def compute_loss(self, inputs, training: bool = False) -> tf.Tensor:
        """The loss of a batch (features, grade), a scalar.

        It is the sum over the tasks of weight * loss, and of the auxiliary loss, if there is one.
        In the papers that have one every task counts once beside it. So it is scaled by the mean
        of the tasks' weights: with the usual halves, all is half of the paper's sum.
        """
        features, grade = inputs
        logits = self.tower_logits(features, training)
        predictions = self._task_predictions(logits)
        labels = {"grade": grade}
        if "group" in features:
            labels["group"] = features["group"]
        terms = [
            self._task_losses[name].weight * task(labels=labels, predictions=predictions[name])
            for name, task in self._tasks.items()
        ]
        if self.auxiliary_weight is not None:
            auxiliary = self.auxiliary_loss(logits, grade)
            self._auxiliary_metric.update_state(auxiliary)
            weights = [loss.weight for loss in self._task_losses.values()]
            scale = self._config.auxiliary_weight * sum(weights) / len(weights)
            terms.append(scale * auxiliary)
        return tf.add_n(terms)

    def _task_predictions(self, logits: dict[str, tf.Tensor]) -> dict[str, dict[str, tf.Tensor]]:
        """What each task's loss is computed on: {task: {"logits": [B], "energy": [B]}}."""
        click, conversion = (logits[tower][:, 0] for tower in TOWERS)
        if self._config.conversion_head == "product":
            conversion = _logit_of_product(click, conversion)
        predictions = {"ctr": {"logits": click}, "ctcvr": {"logits": conversion}}
        for task, tower in TOWER_OF_TASK.items():
            if tower in self._energies:
                predictions[task]["energy"] = logits[tower][:, 1]
        return predictions

    def _encoder(self) -> Encoder:
        return Encoder(self._schema, self._config.embedding_dim, self._config.weight_decay)

    def _mlp(self, units: tuple[int, ...]) -> MLP:
        config = self._config
        return MLP(units, config.dropout, config.weight_decay, config.mixed_precision)

    def _head(self, tower: str) -> Head:
        # Models start at the base rates: calibrated from the first step, instead of spending
        # hundreds of steps on walking there from 1/2.
        bias = log_odds(self._rates[tower]) if tower in self._rates else 0.0
        return Head(bias, self._config.weight_decay, energy=tower in self._energies)


def _base_rates(schema: Schema, conversion_head: str) -> dict[str, tuple[int, int]]:
    """What each tower learns first: tower to (positives, rows) of the training split."""
    if "train" not in schema.splits:
        return dict.fromkeys(TOWERS, (0, 0))
    split = schema.splits["train"]
    converted_of = split.clicks if conversion_head == "product" else split.rows
    return {CLICK: (split.clicks, split.rows), CONVERSION: (split.conversions, converted_of)}


def log_odds(rate: tuple[int, int]) -> float:
    """The logit of a rate given as (positives, rows)."""
    positives, rows = rate
    # Half a row each way keeps a split without positives, or without negatives, finite.
    return math.log((positives + 0.5) / (rows - positives + 0.5))


def _logit_of_product(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """The logit of sigmoid(a) * sigmoid(b), without leaving log space.

    1 - pq = (1 - p) + p (1 - q): a sum, which keeps its digits and gradients where pq is nearly 1.
    """
    log_p, log_q = tf.math.log_sigmoid(a), tf.math.log_sigmoid(b)
    log_rest = tf.reduce_logsumexp([tf.math.log_sigmoid(-a), log_p + tf.math.log_sigmoid(-b)], 0)
    return log_p + log_q - log_rest
