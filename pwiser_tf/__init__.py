"""pwiser-tf: from exposure logs to served CTR, CVR and CTCVR, trained with the PWiseR loss.

Importing this package does not import TensorFlow: a module that needs it does so itself. It only
makes sure that TensorFlow's Keras will be the Keras 2 line, which TensorFlow Recommenders needs.
"""

import os
import sys

# What goes wrong on TensorFlow's C++ side reaches Python as an exception; the rest is chatter.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _use_keras_2() -> None:
    """Binds `tf.keras` to tf_keras, or says why that is no longer possible.

    TensorFlow reads TF_USE_LEGACY_KERAS when `tf.keras` is first touched; setting it later has no
    effect, and mixing the two lines loses variables silently.
    """
    wanted = os.environ.setdefault("TF_USE_LEGACY_KERAS", "1").lower() in ("1", "true")
    tensorflow = sys.modules.get("tensorflow")
    bound = getattr(tensorflow, "__dict__", {}).get("keras") if tensorflow else None
    version = str(getattr(bound, "__version__", "") or "")
    if not wanted or version.startswith("3."):
        raise ImportError(
            "pwiser_tf needs tf.keras to be the Keras 2 line (tf_keras). Import pwiser_tf before "
            "tf.keras is first used, or set TF_USE_LEGACY_KERAS=1 in the environment."
        )


_use_keras_2()
