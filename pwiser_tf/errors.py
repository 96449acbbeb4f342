"""DataError: the one-line error for a mistake in a user's input."""


class DataError(ValueError):
    """Input that cannot be used. Commands print it as one line and exit with code 2.

    Args:
      expected: what was expected, or the whole message if `found` is None.
      file: the file with the mistake.
      row: its line, counted from 1; a header is line 1.
      column: the name of the column, or its number counted from 1.
      found: the value found.
    """

    def __init__(self, expected: str, *, file=None, row=None, column=None, found=None):
        place = [
            str(file) if file is not None else None,
            f"row {row}" if row is not None else None,
            f"column {column}" if column is not None else None,
        ]
        message = ", ".join(part for part in place if part)
        if found is not None:
            text = repr(found) if isinstance(found, str) else str(found)
            text = text if len(text) <= 80 else text[:77] + "..."
            expected = f"found {text}, expected {expected}"
        super().__init__(f"{message}: {expected}" if message else expected)


def one_line(error: Exception | str) -> str:
    """An error as users see it: without errno and line breaks."""
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
