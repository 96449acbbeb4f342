"""Versions: which version of a model is served, found in a folder and replaced while running."""

import contextlib
import logging
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from tensorflow_serving.apis import get_model_status_pb2

from pwiser_serving.server.status import Status, not_found

State = get_model_status_pb2.ModelVersionStatus

_log = logging.getLogger(__name__)


class Servable(Protocol):
    """What a version is once it is loaded."""

    def close(self) -> None: ...


class _Loaded:
    """A version in service, and how many requests are using it."""

    def __init__(self, version: int, servable: Servable):
        self.version, self.servable = version, servable
        self.users = 0
        self.retired = False


class Versions:
    """The versions of one model under `<base_path>/<version>/`.

    The newest version that loads is served. A version that does not load is logged, never
    replaces one that does, and is tried again when its files change. A replaced version is closed
    when the last request that uses it has been answered. A folder that is emptied while running
    leaves the version in memory in service.

    Args:
      name: the model's name in requests.
      base_path: the folder of the version folders, whose names are numbers.
      load: a version's folder to a Servable; raises Status where it does not load.
    """

    def __init__(
        self, name: str, base_path: pathlib.Path, load: Callable[[pathlib.Path], Servable]
    ):
        self.name = name
        self.base_path = base_path
        self._load = load
        self._lock = threading.Lock()
        self._current: _Loaded | None = None
        self._statuses: dict[int, get_model_status_pb2.ModelVersionStatus] = {}
        # Version that failed: what its files looked like then.
        self._failed: dict[int, list] = {}

    @property
    def current(self) -> int | None:
        """The version in service, or None before there is one."""
        with self._lock:
            return self._current and self._current.version

    @contextlib.contextmanager
    def use(self, version: int | None = None) -> Iterator[tuple[int, Servable]]:
        """The version and its servable, kept open within the `with`.

        Raises:
          Status: NOT_FOUND where that version, or with None any, is not in service.
        """
        with self._lock:
            loaded = self._current
            if loaded is None or version not in (None, loaded.version):
                raise no_servable(self.name, version)
            loaded.users += 1
        try:
            yield loaded.version, loaded.servable
        finally:
            with self._lock:
                loaded.users -= 1
                unused = loaded.retired and not loaded.users
            if unused:
                self._close(loaded)

    def statuses(self) -> list[get_model_status_pb2.ModelVersionStatus]:
        """The state of each version that was ever tried, newest first."""
        with self._lock:
            return [self._statuses[version] for version in sorted(self._statuses, reverse=True)]

    def poll(self) -> bool:
        """Looks at the folder once, and loads what should be served. True where that changed it."""
        folders = self._folders()
        current = self.current
        for version in sorted(folders, reverse=True):
            if version == current:
                return False
            files = _files(folders[version])
            if self._failed.get(version) == files:
                continue
            servable = self._try(version, folders[version])
            if servable is not None:
                self._failed.pop(version, None)
                self._replace(_Loaded(version, servable))
                return True
            self._failed[version] = files
        return False

    def close(self) -> None:
        """Takes the model out of service."""
        self._replace(None)

    def _folders(self) -> dict[int, pathlib.Path]:
        folders = {}
        try:
            entries = sorted(os.scandir(self.base_path), key=lambda entry: entry.name)
        except OSError as error:
            _log.error("%s: %s", self.base_path, error.strerror)
            return {}
        for entry in entries:
            if re.fullmatch(r"[0-9]{1,18}", entry.name) and entry.is_dir():
                folders[int(entry.name)] = pathlib.Path(entry.path)
        return folders

    def _try(self, version: int, folder: pathlib.Path) -> Servable | None:
        self._note(version, State.LOADING)
        try:
            servable = self._load(folder)
        except Status as status:
            _log.error("%s version %d does not load: %s", self.name, version, status.message)
            self._note(version, State.END, status)
            return None
        self._note(version, State.AVAILABLE)
        return servable

    def _replace(self, loaded: _Loaded | None) -> None:
        with self._lock:
            old, self._current = self._current, loaded
            if old is None:
                return
            old.retired = True
            unused = not old.users
        self._note(old.version, State.UNLOADING)
        if unused:
            self._close(old)

    def _close(self, loaded: _Loaded) -> None:
        loaded.servable.close()
        self._note(loaded.version, State.END)
        _log.info("%s version %d is closed", self.name, loaded.version)

    def _note(self, version: int, state: int, status: Status | None = None) -> None:
        entry = get_model_status_pb2.ModelVersionStatus(version=version, state=state)
        # An empty status, which is OK, is sent too.
        entry.status.SetInParent()
        if status is not None:
            entry.status.error_code = status.code.value[0]
            entry.status.error_message = status.message
        with self._lock:
            self._statuses[version] = entry


def no_servable(name: str, version: int | None) -> Status:
    """What a request for that version, or with None for any, is answered when there is none."""
    which = f"Latest({name})" if version is None else f"Specific({name}, {version})"
    return not_found(f"Servable not found for request: {which}")


def _files(folder: pathlib.Path) -> list:
    """The names, sizes and times of all files below a folder."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            # A file that is being moved may be gone again.
            with contextlib.suppress(OSError):
                facts = os.stat(path)
                found.append((path, facts.st_size, facts.st_mtime_ns))
    return sorted(found)
