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

# Ended versions whose state is remembered: a server that runs for a year must not collect them.
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


LATEST = Policy()
RETRIES = Retries()


class _Loaded:
    """A version in service, and how many requests are using it."""

    def __init__(self, version: int, servable: Servable):
        self.version = version
        self.servable: Servable | None = servable
        self.users = 0
        self.retired = False


@dataclasses.dataclass
class _Failure:
    """What a version's files looked like when it failed, how often it did, and when last."""

    files: list
    count: int
    time: float


class Versions:
    """The versions of one model under `<base_path>/<version>/`.

    Those that the policy wants are loaded, the newest first. One that does not load is reported
    and skipped, so that of `newest` versions the newest that load are served. It is tried again as
    soon as its files change, and a few times where they do not. A version that is no longer wanted
    is taken out of service once a wanted one is in service, and closed when the last request that
    uses it has been answered. A folder in which nothing is found that is wanted changes nothing.

    Methods may be called from several threads at once.

    Args:
      name: the model's name in requests.
      base_path: the folder of the version folders, whose names are numbers.
      load: a version's folder to a Servable; raises Status where it does not load.
      policy: which versions are wanted.
      retries: see Retries.
    """

    def __init__(
        self,
        name: str,
        base_path: pathlib.Path,
        load: Callable[[pathlib.Path], Servable],
        policy: Policy = LATEST,
        retries: Retries = RETRIES,
    ):
        self.name = name
        self._load = load
        self._retries = retries
        # Held during a look at the folder and its loads, which may take minutes.
        self._looking = threading.Lock()
        # Both are told once, not at every look.
        self._unreadable = False
        self._twins: set[int] = set()
        # Held for an instant. It guards all that follows.
        self._lock = threading.Lock()
        self._base_path, self._policy = base_path, policy
        self._loaded: dict[int, _Loaded] = {}
        self._newest: _Loaded | None = None
        self._closed = False
        self._statuses: dict[int, get_model_status_pb2.ModelVersionStatus] = {}
        self._failures: dict[int, _Failure] = {}

    @property
    def base_path(self) -> pathlib.Path:
        """The folder that is looked at."""
        return self._base_path

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
        """What the next look goes by. A version in service is not loaded again for it."""
        with self._lock:
            self._base_path, self._policy = base_path, policy

    @contextlib.contextmanager
    def use(self, version: int | None = None) -> Iterator[tuple[int, Servable]]:
        """A version, or with None the newest, and its servable, kept open within the `with`.

        Raises:
          Status: NOT_FOUND where that version, or with None any, is not in service.
        """
        with self._lock:
            loaded = self._newest if version is None else self._loaded.get(version)
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
                # Its caller should not wait until a model is taken down.
                threading.Thread(target=self._close, args=(loaded,)).start()

    def statuses(self) -> list[get_model_status_pb2.ModelVersionStatus]:
        """The state of each version that was tried, newest first; of the ended ones the newest."""
        with self._lock:
            return [self._statuses[version] for version in sorted(self._statuses, reverse=True)]

    def poll(self) -> bool:
        """Looks at the folder once, and loads what should be served. True where that changed it."""
        with self._looking:
            with self._lock:
                base_path, policy = self._base_path, self._policy
            try:
                folders = _folders(base_path)
            except OSError as error:
                if not self._unreadable:
                    _log.error(
                        "%s: %s",
                        base_path,
                        error.strerror,
                        extra={"event": "no_base_path", "model": self.name},
                    )
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
            for version in [version for version in self._failures if version not in folders]:
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
            _log.warning(
                "%s: the folders %s are all version %d: %s is taken",
                self.name,
                ", ".join(path.name for path in folders[version]),
                version,
                folders[version][-1].name,
                extra=self._about(version, "twins"),
            )
        self._twins = twins

    def _try(self, version: int, folder: pathlib.Path) -> bool:
        """Loads a version and puts it into service, unless it failed and should be left alone."""
        files = _files(folder)
        failure = self._failures.get(version)
        if failure is None or failure.files != files:
            failure = _Failure(files, 0, 0.0)
        elif (
            failure.count > self._retries.count
            or time.monotonic() < failure.time + self._retries.seconds
        ):
            return False
        self._note(version, State.LOADING)
        servable = self._servable(version, folder)
        if servable is None:
            self._failures[version] = _Failure(files, failure.count + 1, time.monotonic())
            memory.give_back()
            return False
        self._failures.pop(version, None)
        loaded = _Loaded(version, servable)
        with self._lock:
            if self._closed:
                loaded.retired = True
            else:
                self._loaded[version] = loaded
                self._newest = self._loaded[max(self._loaded)]
        if loaded.retired:
            self._close(loaded)
            return False
        self._note(version, State.AVAILABLE)
        _log.info(
            "%s version %d is served now",
            self.name,
            version,
            extra=self._about(version, "served"),
        )
        return True

    def _servable(self, version: int, folder: pathlib.Path) -> Servable | None:
        """A version, loaded; None where it does not load, which is told."""
        try:
            return self._load(folder)
        except Exception as error:
            status = error if isinstance(error, Status) else internal(error)
            self._note(version, State.END, status)
            _log.error(
                "%s version %d does not load: %s",
                self.name,
                version,
                status.message,
                # What the servable did not foresee is a fault of the server.
                exc_info=None if status is error else error,
                extra=self._about(version, "does_not_load", code=status.code.name),
            )
            return None

    def _retire_all_but(self, wanted: set[int]) -> bool:
        """Takes the other versions out of service. True where there were any."""
        with self._lock:
            retired = [self._loaded.pop(version) for version in set(self._loaded) - wanted]
            self._newest = self._loaded[max(self._loaded)] if self._loaded else None
            for loaded in retired:
                loaded.retired = True
            unused = [loaded for loaded in retired if not loaded.users]
            for loaded in retired:
                self._statuses[loaded.version] = _status(loaded.version, State.UNLOADING)
        for loaded in unused:
            self._close(loaded)
        return bool(retired)

    def _close(self, loaded: _Loaded) -> None:
        servable, loaded.servable = loaded.servable, None
        servable.close()
        del servable
        memory.give_back()
        self._note(loaded.version, State.END)
        _log.info(
            "%s version %d is closed",
            self.name,
            loaded.version,
            extra=self._about(loaded.version, "closed"),
        )

    def _note(self, version: int, state: int, status: Status | None = None) -> None:
        with self._lock:
            # A version may have come back while its predecessor of the same number was closed.
            if state == State.END and version in self._loaded:
                return
            self._statuses[version] = _status(version, state, status)
            ended = [
                version for version, entry in self._statuses.items() if entry.state == State.END
            ]
            for version in sorted(ended, reverse=True)[_MAX_ENDED:]:
                del self._statuses[version]

    def _about(self, version: int, event: str, **more) -> dict:
        """A log record's fields."""
        return {"event": event, "model": self.name, "version": version, **more}


def no_servable(name: str, version: int | None) -> Status:
    """What a request for that version, or with None for any, is answered when there is none."""
    which = f"Latest({name})" if version is None else f"Specific({name}, {version})"
    return not_found(f"Servable not found for request: {which}")


def _status(
    version: int, state: int, status: Status | None = None
) -> get_model_status_pb2.ModelVersionStatus:
    entry = get_model_status_pb2.ModelVersionStatus(version=version, state=state)
    # An empty status, which is OK, is sent too.
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
        # What no request could name is no version.
        if re.fullmatch(r"[0-9]{1,19}", entry.name) and int(entry.name) < 2**63 and entry.is_dir():
            folders.setdefault(int(entry.name), []).append(pathlib.Path(entry.path))
    return folders


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
