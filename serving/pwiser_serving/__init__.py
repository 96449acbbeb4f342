"""pwiser_serving: score candidates over TensorFlow Serving's gRPC API.

    with pwiser_serving.Scorer("localhost:8500", "demo") as scorer:
        scores = scorer.score({"price": [1.5, 2.0], "brand": ["acme", None]})

Only `python -m pwiser_serving.server`, and the first SavedModelScorer, import TensorFlow.
"""

import os

# gRPC prints a line for each failed TLS handshake beside the error, before 1.71 as an error. The
# variable is read when gRPC is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from pwiser_serving.base_scorer import Scores
from pwiser_serving.connection import TLS
from pwiser_serving.errors import (
    DeadlineExceeded,
    FeatureError,
    ModelNotFound,
    RequestTooLarge,
    ScoringError,
    ServerUnavailable,
    UsageError,
)
from pwiser_serving.hedging import Hedge
from pwiser_serving.saved_model_scorer import SavedModelScorer
from pwiser_serving.scorer import Metadata, Scorer, VersionStatus

__all__ = [
    "TLS",
    "DeadlineExceeded",
    "FeatureError",
    "Hedge",
    "Metadata",
    "ModelNotFound",
    "RequestTooLarge",
    "SavedModelScorer",
    "Scorer",
    "Scores",
    "ScoringError",
    "ServerUnavailable",
    "UsageError",
    "VersionStatus",
]
