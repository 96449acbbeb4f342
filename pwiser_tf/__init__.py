"""pwiser-tf: from exposure logs to served CTR, CVR and CTCVR, trained with the PWiseR loss.

    pwiser_tf.PWiseRLoss()                    the loss, in any Keras 2 model; pwiser() for tensors
    pwiser_tf.Schema.load("data/us")          what the converter learnt of a data set
    pwiser_tf.train(config, folder)           a run; load_run(folder) its best model
    pwiser_tf.evaluate(...), auc, gauc, ...   exact metrics

Importing this package imports neither TensorFlow nor anything else that is slow: the names below
are imported when they are first used. It only makes sure that TensorFlow's Keras will be the Keras
2 line, which TensorFlow Recommenders needs.
"""

import importlib
import os
import sys

__version__ = "0.1.0"

# Public name: its module.
_PUBLIC = {
    "DataError": "errors",
    "MODELS": "models",
    "PWiseRLoss": "losses",
    "Schema": "schema",
    "Config": "config",
    "auc": "metrics",
    "evaluate": "evaluation",
    "gauc": "metrics",
    "load_run": "runs",
    "pwiser": "losses",
    "summary": "metrics",
    "train": "training",
}
__all__ = sorted(_PUBLIC)


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


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"pwiser_tf.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
