"""pwiser: one command with a subcommand for each step.

    pwiser convert --help

Each subcommand runs a module and takes that module's flags: `pwiser train ...` is the same as
`python -m pwiser_tf.train ...`.
"""

import importlib.util
import runpy
import sys

import pwiser_tf

# Subcommand: (module, arguments that are put before the user's, description).
COMMANDS = {
    "convert": ("pwiser_tf.convert", [], "convert raw logs to TFRecord files and schema.json"),
    "inspect": ("pwiser_tf.convert.inspect", [], "propose a feature file for a log"),
    "sample": ("pwiser_tf.synthetic", [], "generate logs with a planted truth"),
    "train": ("pwiser_tf.train", [], "train a model, evaluate and export it"),
    "evaluate": ("pwiser_tf.evaluate", [], "evaluate one or several runs: metrics and plots"),
    "tune": ("pwiser_tf.tune", [], "search a loss's settings on the validation split"),
    "export": ("pwiser_tf.export", [], "export a run as a SavedModel for TF Serving"),
    "study": ("pwiser_tf.study.paper_table", [], "compare models and losses over several seeds"),
    "worlds": ("pwiser_tf.study.worlds", [], "compare losses where the truth is known"),
    "serve": ("pwiser_serving.server", [], "run a local server with TF Serving's APIs"),
    "score": ("pwiser_serving.client", ["score"], "score a file of candidates over gRPC"),
}


def main() -> None:
    """Runs the subcommand in the first argument."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print("usage: pwiser COMMAND [--flag=value ...]\n\ncommands (pwiser COMMAND --help):")
        for command, (_, _, description) in COMMANDS.items():
            print(f"  {command:10}{description}")
        return
    if name == "--version":
        print(f"pwiser-tf {pwiser_tf.__version__}")
        return
    if name not in COMMANDS:
        expected = ", ".join(COMMANDS)
        sys.exit(_print_error(f"found command {name!r}, expected one of {expected}"))
    module, first, _ = COMMANDS[name]
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        sys.exit(_print_error(f"pwiser {name} needs pwiser-serving, which is not installed"))
    sys.argv = [f"pwiser {name}", *first, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _print_error(message: str) -> int:
    """Prints the message and returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
