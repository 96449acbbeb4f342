"""What a caller of the client may meet. Every message is one line."""

import grpc


class FeatureError(ValueError):
    """Features that the model cannot take: missing, unknown, of another type or shape.

    Attributes:
      feature: its name; row: the position in the array, from 0, or None where all of it is wrong;
      found: the value found, as text, or None; expected: what was expected, or without `found`
      the whole message.
    """

    def __init__(self, feature: str, expected: str, *, row: int | None = None, found=None):
        self.feature, self.row, self.expected = feature, row, expected
        self.found = None if found is None else shorten(found)
        place = f"feature {feature}" if row is None else f"feature {feature}, row {row}"
        text = expected if found is None else f"found {self.found}, expected {expected}"
        super().__init__(f"{place}: {text}")


class ScoringError(RuntimeError):
    """The server refused, failed, or did not answer in time.

    Attributes:
      code: the grpc.StatusCode; model: the model's name; version: the version asked for, or None
      for the newest; details: the server's message.
    """

    def __init__(
        self, address: str, model: str, version: int | None, code: grpc.StatusCode, details: str
    ):
        self.code, self.model, self.version = code, model, version
        self.details = " ".join(details.split())
        which = model if version is None else f"{model}, version {version}"
        super().__init__(f"{address}, model {which}: {code.name}: {self.details}")


class ServerUnavailable(ScoringError):
    """No server answers at that address, after several tries."""


def shorten(value: object) -> str:
    """A value as it may stand in a message: text quoted, at most 80 characters."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
