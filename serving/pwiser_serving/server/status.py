"""Status: how a request fails, as a gRPC code and a message."""

import grpc

# In bytes: gRPC sends a message among the headers, of which a client takes 8 KB.
_LONGEST_MESSAGE = 1024
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Status(Exception):
    """An answer other than OK.

    Attributes:
      code: the grpc.StatusCode; message: the text, cut as TF Serving cuts it.
    """

    def __init__(self, code: grpc.StatusCode | int, message: str):
        super().__init__(message)
        self.code = code if isinstance(code, grpc.StatusCode) else _CODES[code]
        # What is no text (a path may hold any bytes) can neither be sent nor kept in a message.
        data = message.encode("utf-8", "replace")
        self.message = data[:_LONGEST_MESSAGE].decode("utf-8", "ignore")
        if len(data) > _LONGEST_MESSAGE:
            self.message += "...TRUNCATED"


def invalid_argument(message: str) -> Status:
    return Status(grpc.StatusCode.INVALID_ARGUMENT, message)


def not_found(message: str) -> Status:
    return Status(grpc.StatusCode.NOT_FOUND, message)


def failed_precondition(message: str) -> Status:
    return Status(grpc.StatusCode.FAILED_PRECONDITION, message)


def cancelled(message: str) -> Status:
    return Status(grpc.StatusCode.CANCELLED, message)


def deadline_exceeded() -> Status:
    # What TensorFlow's Session says, and so TF Serving.
    return Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Timed out waiting for notification")


def resource_exhausted(message: str) -> Status:
    return Status(grpc.StatusCode.RESOURCE_EXHAUSTED, message)


def unknown(message: str) -> Status:
    return Status(grpc.StatusCode.UNKNOWN, message)


def internal(error: Exception) -> Status:
    """A fault of the server's own, told in one line."""
    return Status(grpc.StatusCode.INTERNAL, " ".join(f"{type(error).__name__}: {error}".split()))


def unimplemented(message: str) -> Status:
    return Status(grpc.StatusCode.UNIMPLEMENTED, message)
