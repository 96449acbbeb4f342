"""A servable that only takes notes, for tests that need no model."""

import pathlib

import grpc
from pwiser_serving.server.status import Status


class Note:
    """Knows its folder, and whether it was closed. A folder with a file `broken` does not load."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.closed = folder, False
        if (folder / "broken").exists():
            raise Status(grpc.StatusCode.DATA_LOSS, f"{folder.name} is broken")

    def close(self):
        assert not self.closed
        self.closed = True
