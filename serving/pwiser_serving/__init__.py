"""pwiser_serving: score candidates over TensorFlow Serving's gRPC API.

    with pwiser_serving.Scorer("localhost:8500", "demo") as scorer:
        scores = scorer.score({"price": [1.5, 2.0], "brand": ["acme", None]})

Nothing here imports TensorFlow, but for what `python -m pwiser_serving.server` needs.
"""

from pwiser_serving.errors import FeatureError, ScoringError, ServerUnavailable
from pwiser_serving.scorer import Scorer

__all__ = ["FeatureError", "Scorer", "ScoringError", "ServerUnavailable"]
