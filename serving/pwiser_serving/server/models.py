"""Models: the models in service by a ModelServerConfig, and the version that a request gets."""

import logging
import pathlib
import threading
from collections.abc import Callable
from concurrent import futures
from contextlib import AbstractContextManager

from google.protobuf.message import Message
from tensorflow_serving.apis import get_model_status_pb2
from tensorflow_serving.config import model_server_config_pb2

from pwiser_serving.server.status import (
    failed_precondition,
    invalid_argument,
    not_found,
    unimplemented,
    unknown,
)
from pwiser_serving.server.versions import (
    Policy,
    Retries,
    Servable,
    Versions,
    no_servable,
)

_log = logging.getLogger(__name__)

PLATFORM = "tensorflow"
# Models that load at the same time; others wait.
_LOADING_THREADS = 16


def single_model(name: str, base_path: pathlib.Path) -> model_server_config_pb2.ModelServerConfig:
    """The configuration of one model whose newest version is served."""
    config = model_server_config_pb2.ModelServerConfig()
    config.model_config_list.config.add(
        name=name, base_path=str(base_path.absolute()), model_platform=PLATFORM
    )
    return config


class Models:
    """The models of a configuration, which can change while they are in service. Thread-safe.

    Args:
      load: a version's folder to a Servable; raises Status if it does not load.
      allow_labels_for_unavailable: a new label may name a version that is not in service (yet).
      retries: when a version that failed is tried again.
    """

    def __init__(
        self,
        load: Callable[[pathlib.Path], Servable],
        *,
        allow_labels_for_unavailable: bool = False,
        retries: Retries | None = None,
    ):
        self._load = load
        self._allow_labels_for_unavailable = allow_labels_for_unavailable
        self._retries = retries or Retries()
        self._pool = futures.ThreadPoolExecutor(_LOADING_THREADS, thread_name_prefix="load")
        # Held while the configuration changes, and while a look begins or ends.
        self._configuring = threading.Lock()
        self._config: model_server_config_pb2.ModelServerConfig | None = None
        # These two are replaced, never changed: readers need no lock.
        self._models: dict[str, Versions] = {}
        self._labels: dict[tuple[str, str], int] = {}
        # Models that were removed, for the states of their versions.
        self._removed: dict[str, Versions] = {}
        # The running looks, and the models that need another look after it.
        self._looks: dict[Versions, futures.Future] = {}
        self._again: set[Versions] = set()

    @property
    def config(self) -> model_server_config_pb2.ModelServerConfig | None:
        """The configuration in force, None before the first. Do not change it."""
        return self._config

    def use(
        self, name: str, version: int | None = None, label: str | None = None
    ) -> AbstractContextManager[tuple[int, Servable]]:
        """A model's version and its servable, kept open within the `with`.

        Args:
          name: the model's; version: its version, or None for the newest in service; label: a
          version by its label.

        Raises:
          Status: INVALID_ARGUMENT for an empty name or an unknown label, NOT_FOUND if that
            version is not in service.
        """
        if not name:
            raise invalid_argument("ModelSpec has no name specified.")
        if label is not None:
            version = self._labels.get((name, label))
            if version is None:
                raise invalid_argument(f"Unrecognized servable version label: {label}")
        model = self._models.get(name)
        if model is None:
            raise no_servable(name, version)
        return model.use(version)

    def statuses(
        self, name: str, version: int | None = None
    ) -> list[get_model_status_pb2.ModelVersionStatus]:
        """The states of a model's versions, newest first, or of one of them.

        Raises:
          Status: NOT_FOUND if there are none.
        """
        model = self._models.get(name) or self._removed.get(name)
        statuses = model.statuses() if model else []
        if version is not None:
            statuses = [status for status in statuses if status.version == version]
            if not statuses:
                raise not_found(f"Could not find version {version} of model {name}")
        elif not statuses:
            raise not_found(f"Could not find any versions of model {name}")
        return statuses

    def configure(self, config: model_server_config_pb2.ModelServerConfig) -> list[str]:
        """Takes a new configuration for the next look, or changes nothing.

        Models that it does not list go out of service. No version is loaded here.

        Returns:
          The names of the new models.

        Raises:
          Status: the configuration is refused, as TF Serving refuses it.
        """
        if config.WhichOneof("config") != "model_config_list":
            raise invalid_argument(
                "ServerModelConfig type not supported by HandleReloadConfigRequest. "
                "Only ModelConfigList is currently supported"
            )
        with self._configuring:
            entries = config.model_config_list.config
            _check(entries, set(self._models))
            labels = self._checked_labels(entries)
            for entry in entries:
                _check_supported(entry)
            models, new = {}, []
            for entry in entries:
                model = self._models.get(entry.name)
                if model is None:
                    load, path = self._load, pathlib.Path(entry.base_path)
                    model = Versions(entry.name, path, load, retries=self._retries)
                    new.append(entry.name)
                model.configure(pathlib.Path(entry.base_path), _policy(entry))
                models[entry.name] = model
            removed = {name: model for name, model in self._models.items() if name not in models}
            self._models, self._labels, self._config = models, labels, config
            for model in removed.values():
                model.close()
            self._removed = {
                name: model
                for name, model in (self._removed | removed).items()
                if name not in models and model.statuses()
            }
        return new

    def reload(self, config: model_server_config_pb2.ModelServerConfig) -> None:
        """Takes a new configuration, and returns after a look at each model's versions.

        Raises:
          Status: as `configure`; UNKNOWN if a new model has no version that loads: it stays
            configured, and is served as soon as it has one.
        """
        new = self.configure(config)
        futures.wait(self.look_again())
        missing = [model for model in self.missing() if model.name in new]
        if missing:
            raise unknown(
                f"{len(missing)} model(s) did not become available: {{"
                + "".join(_problem(model) for model in missing)
                + "}"
            )

    def poll(self) -> list[futures.Future]:
        """Begins a look at the folder of each model that is not being looked at.

        Returns:
          The running looks. None of them raises.
        """
        with self._configuring:
            return [self._begin(model) for model in self._models.values()]

    def look_again(self) -> list[futures.Future]:
        """As `poll`, but a look that is running is followed by another one: it may have begun
        before the configuration changed."""
        with self._configuring:
            # (Two looks at a time would make one thread wait for the other.)
            self._again |= self._looks.keys() & self._models.values()
        return self.poll()

    def all(self) -> list[Versions]:
        """The models of the configuration."""
        return list(self._models.values())

    def missing(self) -> list[Versions]:
        """The models of which no version is in service."""
        return [model for model in self.all() if not model.available]

    def close(self) -> None:
        """Takes all models out of service for good."""
        with self._configuring:
            models, self._models = self._models, {}
            for model in models.values():
                model.close()
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, model: Versions) -> futures.Future:
        """The running look at a model, or a new one."""
        if model not in self._looks:
            self._looks[model] = self._pool.submit(self._look, model)
        return self._looks[model]

    def _look(self, model: Versions) -> None:
        while True:
            try:
                model.poll()
            except Exception:
                # The thread goes on: the next look may succeed.
                extra = {"event": "fault", "model": model.name}
                _log.exception("%s: looking for versions failed", model.name, extra=extra)
            with self._configuring:
                if model not in self._again:
                    del self._looks[model]
                    return
                self._again.remove(model)

    def _checked_labels(self, entries) -> dict[tuple[str, str], int]:
        labels = {}
        for entry in entries:
            model = self._models.get(entry.name)
            available = model.available if model else []
            for label, version in entry.version_labels.items():
                key = (entry.name, label)
                allowed = self._allow_labels_for_unavailable and (
                    self._labels.get(key, version) == version
                )
                if not allowed and version not in available:
                    raise failed_precondition(
                        f"Request to assign label to version {version} of model {entry.name}, "
                        "which is not currently available for inference"
                    )
                labels[key] = version
        return labels


def _problem(model: Versions) -> str:
    """A model that has no version in service, as TF Serving lists it."""
    for status in model.statuses():
        return (
            f"{{{{name: {model.name} version: {status.version}}} due to error: "
            f"{status.status.error_message}}}, "
        )
    return f"{{{{name: {model.name}}} due to error: no version in {model.base_path}}}, "


def _check(entries, present: set[str]) -> None:
    """Raises Status for a configuration that is wrong whatever its labels say."""
    names = set()
    for entry in entries:
        if entry.name in names:
            raise invalid_argument(
                f"Illegal to list model {entry.name} multiple times in config list"
            )
        names.add(entry.name)
    for entry in entries:
        if "://" not in entry.base_path and not entry.base_path.startswith("/"):
            raise invalid_argument(
                f"Expected model {entry.name} to have an absolute path or URI; "
                f"got base_path()={entry.base_path}"
            )
    for entry in entries:
        if entry.name in present and (platform := _platform(entry)) != PLATFORM:
            raise invalid_argument(
                f"Illegal to change a model's platform. For model {entry.name} platform was "
                f"{PLATFORM} and new platform requested is {platform}"
            )


def _check_supported(entry) -> None:
    """Raises Status for another platform, and for what only TF Serving does."""
    if (platform := _platform(entry)) != PLATFORM:
        raise invalid_argument(f"Model {entry.name} requests unsupported platform {platform}")
    if "://" in entry.base_path:
        raise unimplemented(
            f"Model {entry.name} has base_path {entry.base_path}: this server reads only folders "
            "of its machine"
        )
    if entry.HasField("logging_config"):
        raise unimplemented(
            f"Model {entry.name} has a logging_config: this server does not log requests"
        )


def _platform(entry: Message) -> str:
    """The platform of a ModelConfig, by its new field or the old one."""
    if entry.model_type and entry.model_platform:
        raise invalid_argument(
            "Illegal setting both ModelServerConfig::model_type (deprecated) and "
            f"ModelServerConfig::model_platform, model name is {entry.name}"
        )
    if entry.model_type not in (
        model_server_config_pb2.MODEL_TYPE_UNSPECIFIED,
        model_server_config_pb2.TENSORFLOW,
    ):
        raise invalid_argument(
            f"ModelServerConfig::model_type choice {entry.model_type} not supported."
        )
    platform = PLATFORM if entry.model_type else entry.model_platform
    if not platform:
        raise invalid_argument(
            "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
            f"ModelServerConfig::model_platform, model name is {entry.name}"
        )
    return platform


def _policy(entry: Message) -> Policy:
    """A ModelConfig's version policy; the newest version if it names none."""
    policy = entry.model_version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return Policy(newest=None)
    if choice == "specific":
        return Policy(newest=None, only=frozenset(policy.specific.versions))
    return Policy(newest=max(1, policy.latest.num_versions))
