"""Status: how a request fails, as a gRPC code and a message."""

import functools

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
        # A path may hold bytes that are not text, which gRPC cannot send.
        data = message.encode("utf-8", "replace")
        self.message = data[:_LONGEST_MESSAGE].decode("utf-8", "ignore")
        if len(data) > _LONGEST_MESSAGE:
            self.message += "...TRUNCATED"


# Each takes the message.
invalid_argument = functools.partial(Status, grpc.StatusCode.INVALID_ARGUMENT)
not_found = functools.partial(Status, grpc.StatusCode.NOT_FOUND)
failed_precondition = functools.partial(Status, grpc.StatusCode.FAILED_PRECONDITION)
cancelled = functools.partial(Status, grpc.StatusCode.CANCELLED)
resource_exhausted = functools.partial(Status, grpc.StatusCode.RESOURCE_EXHAUSTED)
unknown = functools.partial(Status, grpc.StatusCode.UNKNOWN)
unimplemented = functools.partial(Status, grpc.StatusCode.UNIMPLEMENTED)


def deadline_exceeded() -> Status:
    # The words of TensorFlow's Session, and so of TF Serving.
    return Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Timed out waiting for notification")


def internal(error: Exception) -> Status:
    """A fault of the server itself, in one line."""
    return Status(grpc.StatusCode.INTERNAL, " ".join(f"{type(error).__name__}: {error}".split()))
