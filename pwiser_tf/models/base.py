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

from pwiser_tf.layers import MLP, Encoder
from pwiser_tf.schema import Schema
from pwiser_tf.tasks import LossConfig, TaskLoss

CLICK, CONVERSION = TOWERS = ("click", "conversion")
CONVERSION_HEADS = ("direct", "product")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model; the defaults are MTReclib's.

    Attributes:
      embedding_dim: size of an embedding. bottom_units: MLP sizes of a bottom or expert.
      tower_units: MLP sizes of a tower. experts: how many, where the architecture has them.
      dropout: rate, in every block. weight_decay: L2 on embeddings and dense kernels.
      mixed_precision: train with bfloat16 matrix products (see layers.Block).
      conversion_head: "direct" or "product" (see above).
    """

    embedding_dim: int = 128
    bottom_units: tuple[int, ...] = (512, 256)
    tower_units: tuple[int, ...] = (128, 64)
    experts: int = 8
    dropout: float = 0.2
    weight_decay: float = 1e-6
    mixed_precision: bool = False
    conversion_head: str = "direct"

    def __post_init__(self):
        if self.conversion_head not in CONVERSION_HEADS:
            raise ValueError(f"conversion_head: {self.conversion_head}, not of {CONVERSION_HEADS}")


class ClickConversionModel(tfrs.Model):
    """Base of the architectures. Called with features (see data.batches), it gives probabilities.

    A subclass builds its layers in __init__ and defines `tower_inputs`.

    Args:
      schema: the data set's; config: the sizes.
      losses: how each task is learnt, by its name; needed to train, not to predict.
    """

    def __init__(
        self,
        schema: Schema,
        config: ModelConfig,
        losses: dict[str, LossConfig] | None = None,
    ):
        super().__init__()
        self._schema = schema
        self._config = config
        self._towers = {name: self._mlp(config.tower_units) for name in TOWERS}
        self._logits = {
            name: keras.layers.Dense(
                1,
                kernel_regularizer=keras.regularizers.L2(config.weight_decay / 2),
                bias_initializer=keras.initializers.Constant(_log_odds(rate)),
            )
            for name, rate in _base_rates(schema, config.conversion_head).items()
        }
        self._task_losses = dict(losses or {})
        self._tasks = {
            name: tfrs.tasks.Ranking(
                loss=TaskLoss(name, loss), loss_metrics=[keras.metrics.Mean(f"{name}_loss")]
            )
            for name, loss in self._task_losses.items()
        }

    def tower_inputs(self, features: dict[str, tf.Tensor], training: bool) -> dict[str, tf.Tensor]:
        """Features to {tower: float32 [B, units]}, for both TOWERS."""
        raise NotImplementedError

    def task_logits(
        self, features: dict[str, tf.Tensor], training: bool = False
    ) -> dict[str, tf.Tensor]:
        """Features to {task: float32 [B]}: what each task's loss is computed on."""
        click, conversion = self._tower_logits(features, training)
        if self._config.conversion_head == "product":
            # The logit of sigmoid(click) * sigmoid(conversion), without leaving log space.
            log_product = tf.math.log_sigmoid(click) + tf.math.log_sigmoid(conversion)
            conversion = log_product - _log1mexp(log_product)
        return {"ctr": click, "ctcvr": conversion}

    def call(self, features: dict[str, tf.Tensor], training: bool = False) -> dict[str, tf.Tensor]:
        """Features to probabilities {"ctr", "cvr", "ctcvr"}, float32 [B], ctcvr = ctr * cvr."""
        click, conversion = self._tower_logits(features, training)
        ctr = tf.sigmoid(click)
        if self._config.conversion_head == "product":
            cvr = tf.sigmoid(conversion)
        else:
            # min(q, ctr) / ctr, which stays defined where ctr underflows.
            log_ratio = tf.math.log_sigmoid(conversion) - tf.math.log_sigmoid(click)
            cvr = tf.exp(tf.minimum(log_ratio, 0.0))
        return {"ctr": ctr, "cvr": cvr, "ctcvr": ctr * cvr}

    def compute_loss(self, inputs, training: bool = False) -> tf.Tensor:
        """The weighted sum of the tasks' losses over a batch (features, grade), a scalar."""
        features, grade = inputs
        logits = self.task_logits(features, training)
        return tf.add_n(
            [
                self._task_losses[name].weight * task(labels=grade, predictions=logits[name])
                for name, task in self._tasks.items()
            ]
        )

    def _tower_logits(self, features, training) -> list[tf.Tensor]:
        inputs = self.tower_inputs(features, training)
        return [
            tf.squeeze(self._logits[name](self._towers[name](inputs[name], training)), axis=1)
            for name in TOWERS
        ]

    def _encoder(self) -> Encoder:
        return Encoder(self._schema, self._config.embedding_dim, self._config.weight_decay)

    def _mlp(self, units: tuple[int, ...]) -> MLP:
        config = self._config
        return MLP(units, config.dropout, config.weight_decay, config.mixed_precision)


def _base_rates(schema: Schema, conversion_head: str) -> dict[str, tuple[int, int]]:
    """What each tower learns at a first glance: tower to (positives, rows) of the training split.

    A model whose logits start at these rates is calibrated from its first step, instead of
    spending hundreds of steps on walking there from 1/2.
    """
    if "train" not in schema.splits:
        return dict.fromkeys(TOWERS, (0, 0))
    split = schema.splits["train"]
    converted_of = split.clicks if conversion_head == "product" else split.rows
    return {CLICK: (split.clicks, split.rows), CONVERSION: (split.conversions, converted_of)}


def _log_odds(rate: tuple[int, int]) -> float:
    positives, rows = rate
    # Half a row each way keeps a split without positives, or without negatives, finite.
    return math.log((positives + 0.5) / (rows - positives + 0.5))


def _log1mexp(x: tf.Tensor) -> tf.Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends (Maechler 2012)."""
    x = tf.minimum(x, -1e-7)
    near_zero = x > -0.6931472
    # Each branch is kept finite where the other is used, or its gradient would be NaN.
    upper = tf.math.log(-tf.math.expm1(tf.where(near_zero, x, -1.0)))
    lower = tf.math.log1p(-tf.exp(tf.where(near_zero, -1.0, x)))
    return tf.where(near_zero, upper, lower)
