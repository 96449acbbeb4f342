"""Versions: which versions of a model are in service, found in a folder, replaced while running."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from tensorflow_serving.apis import get_model_status_pb2

from pwiser_serving.server import memory
from pwiser_serving.server.status import Status, internal, not_found

State = get_model_status_pb2.ModelVersionStatus

# Ended versions whose state is remembered, so that memory does not grow over months.
_MAX_ENDED = 100

_log = logging.getLogger(__name__)


class Servable(Protocol):
    """What a version is once it is loaded."""

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which of the versions found are wanted.

    Attributes:
      newest: this many of the newest ones, or None for all of them.
      only: of these versions, or None for any.
    """

    newest: int | None = 1
    only: frozenset[int] | None = None


@dataclasses.dataclass(frozen=True)
class Retries:
    """When a version that failed is tried again although its files are as they were.

    Attributes:
      count: how often; seconds: how long after the last failure.
    """

    count: int = 5
    seconds: float = 60


@dataclasses.dataclass(eq=False)
class _Loaded:
    """A version that is loaded, and how many requests are using it."""

    version: int
    servable: Servable | None
    users: int = 0
    retired: bool = False


@dataclasses.dataclass
class _Failure:
    """What a version's files looked like when it failed, how often it did, and when last."""

    files: list
    count: int = 0
    time: float = 0.0


class Versions:
    """The versions of one model under `<base_path>/<version>/`. Thread-safe.

    The versions that the policy wants are loaded, the newest first. One that does not load is
    reported and skipped, so that of `newest` versions the newest that load are served. It is tried
    again as soon as its files change, and otherwise a few times. A version that is no longer wanted
    goes out of service when a wanted one is in service, and is closed after the last request that
    uses it. If the folder holds no wanted version, nothing changes.

    Args:
      name: the model's name in requests.
      base_path: the folder of the version folders, whose names are numbers.
      load: a version's folder to a Servable; raises Status if it does not load.
      policy: which versions are wanted.
      retries: see Retries.

    Attributes:
      base_path, policy: what the next look uses. A new base path does not reload versions that are
      in service.
    """

    def __init__(
        self,
        name: str,
        base_path: pathlib.Path,
        load: Callable[[pathlib.Path], Servable],
        policy: Policy = Policy(),
        retries: Retries = Retries(),
    ):
        self.name, self.base_path, self.policy = name, base_path, policy
        self._load, self._retries = load, retries
        # Held during a look at the folder and its loads, which may take minutes.
        self._looking = threading.Lock()
        # Both are reported once, not at every look.
        self._unreadable = False
        self._twins: set[int] = set()
        self._failures: dict[int, _Failure] = {}
        # Held for an instant; guards what follows.
        self._lock = threading.Lock()
        self._loaded: dict[int, _Loaded] = {}
        self._closed = False
        self._statuses: dict[int, get_model_status_pb2.ModelVersionStatus] = {}

    @property
    def available(self) -> list[int]:
        """The versions in service, newest first."""
        with self._lock:
            return sorted(self._loaded, reverse=True)

    @property
    def loading(self) -> bool:
        """Whether a version is being loaded."""
        return any(status.state == State.LOADING for status in self.statuses())

    def configure(self, base_path: pathlib.Path, policy: Policy) -> None:
        """Sets what the next look uses."""
        with self._lock:
            self.base_path, self.policy = base_path, policy

    @contextlib.contextmanager
    def use(self, version: int | None = None) -> Iterator[tuple[int, Servable]]:
        """A version, or with None the newest, and its servable, kept open within the `with`.

        Raises:
          Status: NOT_FOUND if that version, or with None any, is not in service.
        """
        with self._lock:
            newest = max(self._loaded, default=None)
            loaded = self._loaded.get(newest if version is None else version)
            if loaded is None:
                raise no_servable(self.name, version)
            loaded.users += 1
        try:
            yield loaded.version, loaded.servable
        finally:
            with self._lock:
                loaded.users -= 1
                unused = loaded.retired and not loaded.users
            if unused:
                # In a thread: the caller does not wait for it.
                threading.Thread(target=self._close, args=(loaded,)).start()

    def statuses(self) -> list[get_model_status_pb2.ModelVersionStatus]:
        """The state of each version that was tried, newest first; of the ended ones the newest."""
        with self._lock:
            return [self._statuses[version] for version in sorted(self._statuses, reverse=True)]

    def poll(self) -> bool:
        """Looks at the folder once and loads what should be served. True if that changed it."""
        with self._looking:
            with self._lock:
                base_path, policy = self.base_path, self.policy
            try:
                folders = _folders(base_path)
            except OSError as error:
                if not self._unreadable:
                    extra = {"event": "no_base_path", "model": self.name}
                    _log.error("%s: %s", base_path, error.strerror, extra=extra)
                self._unreadable = True
                return False
            self._unreadable = False
            self._warn_of_twins(folders)
            changed = False
            wanted: set[int] = set()
            for version in sorted(folders, reverse=True):
                if len(wanted) == policy.newest:
                    break
                if policy.only is not None and version not in policy.only:
                    continue
                if version not in self._loaded:
                    if not self._try(version, folders[version][-1]):
                        continue
                    changed = True
                wanted.add(version)
            for version in self._failures.keys() - folders.keys():
                del self._failures[version]
            if wanted:
                changed |= self._retire_all_but(wanted)
            return changed

    def close(self) -> None:
        """Takes the model out of service for good."""
        with self._lock:
            self._closed = True
        self._retire_all_but(set())

    def _warn_of_twins(self, folders: dict[int, list[pathlib.Path]]) -> None:
        """Warns of several folders with one number, of which only one can be served."""
        twins = {version for version, paths in folders.items() if len(paths) > 1}
        for version in sorted(twins - self._twins):
            paths = folders[version]
            names = ", ".join(path.name for path in paths)
            message = f"the folders {names} are all version {version}: {paths[-1].name} is taken"
            _log.warning("%s: %s", self.name, message, extra=self._about(version, "twins"))
        self._twins = twins

    def _try(self, version: int, folder: pathlib.Path) -> bool:
        """Loads a version and puts it into service, unless it failed and should be left alone."""
        files = _files(folder)
        failure = self._failures.get(version)
        if failure is None or failure.files != files:
            failure = _Failure(files)
        elif (
            failure.count > self._retries.count
            or time.monotonic() < failure.time + self._retries.seconds
        ):
            return False
        self._note(version, State.LOADING)
        try:
            servable = self._load(folder)
        except Exception as error:
            status = error if isinstance(error, Status) else internal(error)
            self._note(version, State.END, status)
            _log.error(
                "%s version %d does not load: %s",
                self.name,
                version,
                status.message,
                # Only a Status is expected: anything else is a fault of the server.
                exc_info=None if status is error else error,
                extra=self._about(version, "does_not_load", code=status.code.name),
            )
            self._failures[version] = _Failure(files, failure.count + 1, time.monotonic())
            memory.give_back()
            return False
        self._failures.pop(version, None)
        loaded = _Loaded(version, servable)
        with self._lock:
            loaded.retired = self._closed
            if not self._closed:
                self._loaded[version] = loaded
        if loaded.retired:
            self._close(loaded)
            return False
        self._note(version, State.AVAILABLE)
        extra = self._about(version, "served")
        _log.info("%s version %d is served now", self.name, version, extra=extra)
        return True

    def _retire_all_but(self, wanted: set[int]) -> bool:
        """Takes the other versions out of service. True if there were any."""
        with self._lock:
            retired = [self._loaded.pop(version) for version in self._loaded.keys() - wanted]
            for loaded in retired:
                loaded.retired = True
                self._statuses[loaded.version] = _status(loaded.version, State.UNLOADING)
            unused = [loaded for loaded in retired if not loaded.users]
        for loaded in unused:
            self._close(loaded)
        return bool(retired)

    def _close(self, loaded: _Loaded) -> None:
        servable, loaded.servable = loaded.servable, None
        servable.close()
        del servable
        memory.give_back()
        self._note(loaded.version, State.END)
        extra = self._about(loaded.version, "closed")
        _log.info("%s version %d is closed", self.name, loaded.version, extra=extra)

    def _note(self, version: int, state: int, status: Status | None = None) -> None:
        with self._lock:
            # A version may have come back while its predecessor of the same number was closed.
            if state == State.END and version in self._loaded:
                return
            self._statuses[version] = _status(version, state, status)
            ended = [number for number, e in self._statuses.items() if e.state == State.END]
            for number in sorted(ended, reverse=True)[_MAX_ENDED:]:
                del self._statuses[number]

    def _about(self, version: int, event: str, **more) -> dict:
        """A log record's fields."""
        return {"event": event, "model": self.name, "version": version, **more}


def no_servable(name: str, version: int | None) -> Status:
    """The answer to a request for that version, or with None for any, if there is none."""
    which = f"Latest({name})" if version is None else f"Specific({name}, {version})"
    return not_found(f"Servable not found for request: {which}")


def _status(
    version: int, state: int, status: Status | None = None
) -> get_model_status_pb2.ModelVersionStatus:
    entry = get_model_status_pb2.ModelVersionStatus(version=version, state=state)
    # OK is sent too, as an empty status.
    entry.status.SetInParent()
    if status is not None:
        entry.status.error_code = status.code.value[0]
        entry.status.error_message = status.message
    return entry


def _folders(base_path: pathlib.Path) -> dict[int, list[pathlib.Path]]:
    """The version folders by their numbers, which 7 and 007 share, each number's sorted by name.

    Raises:
      OSError: the base path cannot be read.
    """
    folders = {}
    for entry in sorted(os.scandir(base_path), key=lambda entry: entry.name):
        # Only numbers that a request can name.
        if re.fullmatch(r"[0-9]{1,19}", entry.name) and int(entry.name) < 2**63 and entry.is_dir():
            folders.setdefault(int(entry.name), []).append(pathlib.Path(entry.path))
    return folders


def _files(folder: pathlib.Path) -> list:
    """The names, sizes and times of all files below a folder."""
    found = []
    for path in folder.rglob("*"):
        # A file that is being moved may be gone again.
        with contextlib.suppress(OSError):
            facts = path.stat()
            found.append((str(path), facts.st_size, facts.st_mtime_ns))
    return sorted(found)
