"""pwiser: one command for all that this project does.

    pwiser convert --help

Each subcommand is a module, and takes its flags: `pwiser train ...` is `python -m pwiser_tf.train
...`.
"""

import importlib.util
import runpy
import sys

import pwiser_tf

# Subcommand: its module, the arguments that stand before the user's, and what it does.
COMMANDS = {
    "convert": ("pwiser_tf.convert", [], "raw logs to TFRecords and schema.json"),
    "sample": ("pwiser_tf.synthetic", [], "generate logs with a planted truth"),
    "train": ("pwiser_tf.train", [], "train a model, evaluate and export it"),
    "evaluate": ("pwiser_tf.evaluate", [], "metrics and plots of one or several runs"),
    "tune": ("pwiser_tf.tune", [], "search a loss's settings on the validation split"),
    "export": ("pwiser_tf.export", [], "a run as a SavedModel for TF Serving"),
    "study": ("pwiser_tf.study.paper_table", [], "models x losses x seeds, as the paper's table"),
    "serve": ("pwiser_serving.server", [], "a local server with TF Serving's APIs"),
    "score": ("pwiser_serving.client", ["score"], "score a file of candidates over gRPC"),
}


def main() -> None:
    """Runs the subcommand that the arguments name."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print("usage: pwiser COMMAND [--flag=value ...]\n\ncommands (pwiser COMMAND --help):")
        for command, (_, _, does) in COMMANDS.items():
            print(f"  {command:10}{does}")
        return
    if name == "--version":
        print(f"pwiser-tf {pwiser_tf.__version__}")
        return
    if name not in COMMANDS:
        expected = ", ".join(COMMANDS)
        sys.exit(_wrong(f"found command {name!r}, expected one of {expected}"))
    module, first, _ = COMMANDS[name]
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        sys.exit(_wrong(f"pwiser {name} needs pwiser-serving, which is not installed"))
    sys.argv = [f"pwiser {name}", *first, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _wrong(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
