"""The one way in which this package writes a file: a reader sees it complete or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a path to write to, whose file becomes `path` when the block ends without an error.

    Several processes may write the same file: the last one wins.

    Raises:
      OSError: the file cannot be written; it names `path`.
    """
    path = pathlib.Path(path)
    # In the same folder, so that it can be renamed; with the same suffix, which writers look at.
    aside = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield aside
        aside.replace(path)
    except OSError as error:
        # A failed write names no file, or the partial one, of which the user knows nothing.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file as UTF-8, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
