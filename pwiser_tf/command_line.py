"""Runs a command and sets its exit code: 0, 2 for a user's mistake (one line), 1 for a bug."""

import logging
import sys
from collections.abc import Callable

import absl.logging
from absl import app, flags

from pwiser_tf.errors import DataError, one_line


def run(main: Callable[..., None], argument: str | None = None) -> None:
    """Parses the flags, calls main() and exits.

    Args:
      main: does the work. argument: what the one positional argument is, which main is then called
        with; None: there is none.

    A wrong flag, a DataError and an operating-system error (no such file, no permission, disk
    full) print one line on stderr and exit with code 2, without a traceback. Any other exception
    is a bug: it prints its traceback and exits with code 1.
    """

    def parse(argv):
        try:
            positional = flags.FLAGS(argv)
        except flags.Error as error:
            _fail(error)
        if argument and len(positional) == 1:
            _fail(f"expected {argument}: a file or folder")
        if len(positional) > (2 if argument else 1):
            _fail(f"unexpected argument {positional[-1]!r}; flags start with --")
        return positional

    # --help shows only the flags of the main module; ours are defined in other modules.
    for module, defined in list(flags.FLAGS.flags_by_module_dict().items()):
        if module.startswith("pwiser_tf"):
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

    def guarded(positional):
        # Hide TensorFlow's log lines: the output of our commands would be lost among them.
        absl.logging.set_verbosity(absl.logging.ERROR)
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
        try:
            main(*positional[1:])
        except (DataError, OSError) as error:
            _fail(error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=parse)


def _fail(error) -> None:
    print("error:", one_line(error), file=sys.stderr)
    sys.exit(2)
