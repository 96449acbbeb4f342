"""The architectures, by the name that --model takes."""

from pwiser_tf.models.aitm import AITM
from pwiser_tf.models.base import MODELS, ClickConversionModel, ModelConfig
from pwiser_tf.models.escm2 import ESCM2DR, ESCM2IPS
from pwiser_tf.models.esmm import ESMM
from pwiser_tf.models.metaheac import MetaHeac
from pwiser_tf.models.mmoe import MMoE
from pwiser_tf.models.omoe import OMoE
from pwiser_tf.models.ple import PLE
from pwiser_tf.models.shared_bottom import SharedBottom
from pwiser_tf.models.single_task import SingleTask
from pwiser_tf.models.stem import STEM

MODELS |= {
    "single_task": SingleTask,
    "shared_bottom": SharedBottom,
    "omoe": OMoE,
    "mmoe": MMoE,
    "ple": PLE,
    "esmm": ESMM,
    "aitm": AITM,
    "metaheac": MetaHeac,
    "stem": STEM,
    "escm2_ips": ESCM2IPS,
    "escm2_dr": ESCM2DR,
}

__all__ = ["MODELS", "ClickConversionModel", "ModelConfig"]
