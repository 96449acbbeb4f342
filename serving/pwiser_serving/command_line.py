"""What both commands share: a user's mistake is one line on stderr and exit code 2."""

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


def fail(error: object) -> NoReturn:
    """Prints the error as one line and exits with code 2."""
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)
