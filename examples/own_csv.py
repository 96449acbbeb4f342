"""From a CSV file to scores in Python, without a server: convert, train, export, score.

    python examples/make_log.py log.csv
    python examples/own_csv.py log.csv own      # writes own/data, own/run and own/models/log/1

For your own log, change the names of the columns below, and the candidates at the end.
"""

import pwiser_tf.quiet

# isort: split

import pathlib
import subprocess
import sys

import pwiser_tf
from pwiser_tf.export import export


def main() -> None:
    log, folder = sys.argv[1], pathlib.Path(sys.argv[2])

    # The converter is a command. It does not import TensorFlow.
    command = [sys.executable, "-m", "pwiser_tf.convert", "--format=columns", f"--train={log}"]
    columns = ["--categorical=user,city,item", "--numerical=age,price"]
    labels = ["--click=clicked", "--conversion=bought", "--group=session", "--time=day"]
    output = [f"--output_dir={folder / 'data'}", "--overwrite"]
    subprocess.run([*command, *columns, *labels, *output], check=True)

    # All other options have their defaults; docs/reference/flags.md lists them.
    options = {"model": "shared_bottom", "embedding_dim": 16, "bottom_units": (64, 32)}
    options |= {"tower_units": (16,), "batch_size": 512, "epochs": 3}
    config = pwiser_tf.Config.of(data_dir=str(folder / "data"), **options)
    metrics = pwiser_tf.train(config, folder / "run")
    print(f"test AUC: CTR {metrics['test']['ctr']['auc']:.4f}")

    version = export(folder / "run", folder / "models", "log")
    print("exported", version)

    import pwiser_serving

    candidates = {"user": ["u3", "u3", "new"], "city": ["Paris", "Paris", None], "item": [7, 8, 9]}
    candidates |= {"age": [21, 21, None], "price": [9.5, 60.0, 12.0]}
    with pwiser_serving.SavedModelScorer(folder / "models" / "log") as scorer:
        scores = scorer.score(candidates)
    for ctr, cvr, ctcvr in zip(scores["ctr"], scores["cvr"], scores["ctcvr"], strict=True):
        print(f"ctr {ctr:.4f}  cvr {cvr:.4f}  ctcvr {ctcvr:.4f}")


if __name__ == "__main__":
    main()
