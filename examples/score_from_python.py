"""Scores candidates with a model behind TF Serving or the local server, over gRPC.

    pwiser serve --port=8500 --model_name=log --model_base_path=own/models/log
    python examples/score_from_python.py localhost:8500 log

The client needs grpcio, protobuf and NumPy. It does not import TensorFlow.
"""

import sys

import pwiser_serving


def main() -> None:
    server, model = sys.argv[1:]
    # One list for each raw feature, one element for each candidate. None is a missing value.
    candidates = {
        "user": ["u3", "u3", "u3"],
        "age": [21, 21, 21],
        "city": ["Paris", "Paris", "Paris"],
        "item": [7, 8, 9],
        "price": [9.5, 60.0, None],
    }
    # Create one Scorer and keep it: opening a connection takes longer than scoring.
    with pwiser_serving.Scorer(server, model, timeout=5) as scorer:
        try:
            scores = scorer.score(candidates)
        except pwiser_serving.FeatureError as error:
            sys.exit(f"the model has other features: {error}")
        except pwiser_serving.ScoringError as error:
            sys.exit(f"no scores: {error}")
    print(f"model {model}, version {scores.version}")
    ranked = sorted(zip(scores["ctcvr"], candidates["item"], strict=True), reverse=True)
    for ctcvr, item in ranked:
        print(f"item {item}: ctcvr {ctcvr:.4f}")
    assert "tensorflow" not in sys.modules


if __name__ == "__main__":
    main()
