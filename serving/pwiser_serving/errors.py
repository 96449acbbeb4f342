"""The client's errors. Every message is one line."""

import grpc


class FeatureError(ValueError):
    """Features that the model cannot take: missing, unknown, of another type or shape.

    Attributes:
      feature: its name; row: the position in the array, from 0, or None if all of it is wrong;
      found: the value found, as text, or None; expected: what was expected, or without `found`
      the whole message.
    """

    def __init__(self, feature: str, expected: str, *, row: int | None = None, found=None):
        # Pickling calls __init__ with these.
        super().__init__(feature, expected)
        self.feature, self.row, self.expected = feature, row, expected
        self.found = None if found is None else shorten(found)

    def __str__(self) -> str:
        place = f"feature {self.feature}"
        place += "" if self.row is None else f", row {self.row}"
        if self.found is None:
            return f"{place}: {self.expected}"
        return f"{place}: found {self.found}, expected {self.expected}"


class ScoringError(RuntimeError):
    """The server refused, failed, or did not answer in time.

    Attributes:
      code: the grpc.StatusCode; model: the model's name; version: the version (int) or label (str)
      asked for, or None for the newest; details: the server's message.
    """

    def __init__(
        self,
        address: str,
        model: str,
        version: int | str | None,
        code: grpc.StatusCode,
        details: str,
    ):
        super().__init__(address, model, version, code, details)
        self.address, self.model, self.version, self.code = address, model, version, code
        self.details = " ".join(details.split())

    def __str__(self) -> str:
        which = self.model
        if self.version is not None:
            kind = "label" if isinstance(self.version, str) else "version"
            which += f", {kind} {self.version}"
        return f"{self.address}, model {which}: {self.code.name}: {self.details}"


class ServerUnavailable(ScoringError):
    """No server answers at that address after several tries: none is there, or TLS failed."""


class DeadlineExceeded(ScoringError):
    """No answer within the timeout."""


class RequestTooLarge(ScoringError):
    """A request above the server's message limit. The Scorer splits it by rows, so this is raised
    only for a single row.

    Attributes:
      row: its position in the features, from 0.
    """

    row: int | None = None

    def __str__(self) -> str:
        text = super().__str__()
        if self.row is None:
            return text
        return f"{text}; row {self.row} alone is above the server's message limit"


class ModelNotFound(ScoringError):
    """The server does not have that model, version or label now."""


class UsageError(RuntimeError):
    """A Scorer is used after close(), or waits for an answer inside a callback of a future:
    callbacks run on gRPC's only thread, which receives the answers."""


# How gRPC, in C++ and in Go, refuses a large request.
_TOO_LARGE = "message larger than max"
# The server answers an unknown label with INVALID_ARGUMENT.
_UNKNOWN_LABEL = "Unrecognized servable version label"


def scoring_error(
    address: str,
    model: str,
    version: int | str | None,
    timeout: float,
    proxy: str | None,
    error: grpc.RpcError,
) -> ScoringError:
    """The typed error for a failed gRPC call.

    Args:
      proxy: the environment variable of the proxy that is used, with its value, or None.
    """
    code, details = error.code(), error.details() or ""
    kind = ScoringError
    if code is grpc.StatusCode.UNAVAILABLE:
        kind, details = ServerUnavailable, f"no server answers ({details})"
        if proxy:
            details += f"; the connection goes through the proxy of the environment's {proxy}"
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
        kind, details = DeadlineExceeded, f"no answer within {timeout:g} seconds"
    elif code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in details.lower():
        kind = RequestTooLarge
    elif code is grpc.StatusCode.NOT_FOUND or details.startswith(_UNKNOWN_LABEL):
        kind = ModelNotFound
    return kind(address, model, version, code, details)


def shorten(value: object) -> str:
    """A value for a message: text quoted, at most 80 characters."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
