"""The architectures, by the name that --model takes."""

from pwiser_tf.models.base import ClickConversionModel, ModelConfig
from pwiser_tf.models.mmoe import MMoE
from pwiser_tf.models.shared_bottom import SharedBottom
from pwiser_tf.models.single_task import SingleTask

MODELS = {
    "single_task": SingleTask,
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
}

__all__ = ["MODELS", "ClickConversionModel", "ModelConfig"]
