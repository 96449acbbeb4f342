"""What both commands share: a user's mistake is one line on stderr, and exit code 2."""

import argparse
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Flags as --name value or --name=value, written in full; a wrong one is one line."""

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; --help lists the flags")


def fail(error: object, code: int = 2) -> NoReturn:
    """Prints the error, with its notes, as one line and exits with the code."""
    notes = getattr(error, "__notes__", [])
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = "; ".join([str(error), *notes])
    print("error:", " ".join(text.split()), file=sys.stderr)
    sys.exit(code)
