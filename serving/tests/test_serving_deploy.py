"""deploy/: each file read as TF Serving, Prometheus, Grafana, Docker or Kubernetes would.

Of Prometheus' own checker and Kubernetes' schema, which no light package brings, deploy/README.md
says when they were last run by hand.
"""

import contextlib
import http.client
import inspect
import json
import os
import pathlib
import re
import socket

import pytest
import yaml
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
    wrappers_pb2,
)
from pwiser_serving import Scorer
from pwiser_serving.server import config_pb2
from pwiser_serving.server.models import Models
from pwiser_serving.server.status import Status
from tensorflow_serving.config import model_server_config_pb2
from waiting import wait_for

DEPLOY = pathlib.Path(__file__).resolve().parents[1] / "deploy"
README = (DEPLOY / "README.md").read_text()

# What TF Serving exports of what is used here: labels, and where its source (tensorflow/serving at
# 9d981c5, TensorFlow for the last two) makes it. "/" becomes ":" in util/prometheus_exporter.cc.
COUNTERS = {
    ":tensorflow:serving:request_count": {"model_name", "status"},  # servables/tensorflow/util.cc
    # tensorflow/cc/saved_model/loader.cc
    ":tensorflow:cc:saved_model:load_attempt_count": {"model_path", "status"},
    ":tensorflow:cc:saved_model:load_latency": {"model_path"},
}
HISTOGRAMS = {
    # servables/tensorflow/util.cc
    ":tensorflow:serving:request_latency": {"model_name", "API", "entrypoint"},
    ":tensorflow:serving:runtime_latency": {"model_name", "API", "runtime"},
    # servables/tensorflow/saved_model_warmup_util.cc
    ":tensorflow:serving:model_warmup_latency": {"model_path", "status"},
    # batching/batching_session.cc
    ":tensorflow:serving:batching_session:queuing_latency": {"thread_pool_name"},
    # batching/batching_util.h; BatchingSessionTask::Name() is batching_session
    ":tensorflow:serving:batching_session:padding_size": {"execution_batch_size"},
    ":tensorflow:serving:batching_session:processed_batch_size": set(),
}
SERIES = COUNTERS | {
    f"{name}_{part}": labels | ({"le"} if part == "bucket" else set())
    for name, labels in HISTOGRAMS.items()
    for part in ("bucket", "sum", "count")
}
# What Prometheus itself adds.
SERIES["up"] = set()
TARGET_LABELS = {"job", "instance"}


def _batching_parameters():
    """TF Serving's BatchingParameters (servables/tensorflow/session_bundle_config.proto).

    tensorflow-serving-api leaves it out.
    """
    kinds = descriptor_pb2.FieldDescriptorProto
    wrapped = ".google.protobuf.{}Value".format
    scalars = {"int64": kinds.TYPE_INT64, "bool": kinds.TYPE_BOOL}
    fields = {
        "max_batch_size": (1, wrapped("Int64")),
        "batch_timeout_micros": (2, wrapped("Int64")),
        "max_enqueued_batches": (3, wrapped("Int64")),
        "num_batch_threads": (4, wrapped("Int64")),
        "thread_pool_name": (5, wrapped("String")),
        "allowed_batch_sizes": (6, "int64"),
        "pad_variable_length_inputs": (7, "bool"),
        "enable_large_batch_splitting": (8, wrapped("Bool")),
        "max_execution_batch_size": (9, wrapped("Int64")),
    }
    file = descriptor_pb2.FileDescriptorProto(
        name="deploy_test.proto",
        package="tensorflow.serving",
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )
    message = file.message_type.add(name="BatchingParameters")
    for field, (number, kind) in fields.items():
        label = kinds.LABEL_REPEATED if field.endswith("sizes") else kinds.LABEL_OPTIONAL
        entry = message.field.add(name=field, number=number, label=label)
        if kind in scalars:
            entry.type = scalars[kind]
        else:
            entry.type, entry.type_name = kinds.TYPE_MESSAGE, kind
    # A pool of its own: the default one may have TF Serving's files.
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName("tensorflow.serving.BatchingParameters")
    )()


def _parsed(name, message):
    return text_format.Parse((DEPLOY / name).read_text(), message)


def _models_config():
    return _parsed("models.config", model_server_config_pb2.ModelServerConfig())


def test_models_config():
    (model,) = _models_config().model_config_list.config
    assert model.model_platform == "tensorflow"
    assert model.base_path == f"/models/{model.name}"
    # A label to a version that is not served would answer nobody.
    assert set(model.version_labels.values()) <= set(model.model_version_policy.specific.versions)
    assert set(model.version_labels) == {"stable"}


def test_batching_config():
    config = _parsed("batching.config", _batching_parameters())
    sizes = list(config.allowed_batch_sizes)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == config.max_batch_size.value
    assert config.max_execution_batch_size.value in sizes
    assert config.num_batch_threads.value >= 1
    # The largest request finds room in an empty queue.
    room = config.max_enqueued_batches.value * config.max_execution_batch_size.value
    assert room >= config.max_batch_size.value
    assert config.batch_timeout_micros.value >= 0
    # What the client sends in one request must be allowed in one batch.
    default = inspect.signature(Scorer).parameters["rows_per_request"].default
    assert default <= config.max_batch_size.value
    assert config.enable_large_batch_splitting.value


def test_monitoring_config():
    monitoring = _parsed("monitoring.config", config_pb2.MonitoringConfig()).prometheus_config
    assert monitoring.enable
    scrape = _yaml("prometheus/prometheus.yaml")["scrape_configs"][0]
    assert monitoring.path == scrape["metrics_path"]
    annotations = _kubernetes()["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] == monitoring.path


def test_ssl_config():
    ssl = _parsed("ssl.config", config_pb2.SSLConfig())
    assert ssl.server_key.startswith("-----BEGIN PRIVATE KEY-----\n")
    assert ssl.server_cert.endswith("-----END CERTIFICATE-----\n")
    assert not ssl.client_verify


def _steps():
    """The texts of README.md's canary, as whole configurations, in order."""
    blocks = re.findall(r"```textproto\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    configs = []
    for block in blocks:
        config = _models_config()
        (model,) = config.model_config_list.config
        model.ClearField("model_version_policy")
        model.ClearField("version_labels")
        text_format.Merge(block, model)
        configs.append(config)
    return configs


class _Version:
    def __init__(self, folder):
        self.number = int(folder.name)

    def close(self):
        pass


@pytest.fixture
def serve(tmp_path):
    """A function that starts models as a server with the flag for labels does, or without it."""
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
    started = []

    def start(config, allow=True):
        started.append(Models(_Version, allow_labels_for_unavailable=allow))
        reload(started[-1], config)
        return started[-1]

    def reload(models, config):
        config.model_config_list.config[0].base_path = str(tmp_path)
        models.reload(config)

    start.reload = reload
    yield start
    for models in started:
        models.close()


def _answers(models):
    """The version that answers each label and none; None where nobody would."""
    found = {}
    for label in ("stable", "canary", None):
        try:
            with models.use("demo", label=label) as (version, _):
                found[label] = version
        except Status:
            found[label] = None
    return found


def test_the_canary_goes_as_the_readme_says(serve):
    loaded, labelled, moved, done = _steps()
    models = serve(_models_config())
    assert _answers(models) == {"stable": 1, "canary": None, None: 1}
    # Whoever names nothing gets the highest version in service.
    for step, expected in (
        (loaded, {"stable": 1, "canary": None, None: 2}),
        (labelled, {"stable": 1, "canary": 2, None: 2}),
        (moved, {"stable": 2, "canary": 2, None: 2}),
        (loaded, {"stable": 1, "canary": None, None: 2}),
        (labelled, {"stable": 1, "canary": 2, None: 2}),
        (moved, {"stable": 2, "canary": 2, None: 2}),
        (done, {"stable": 2, "canary": None, None: 2}),
    ):
        serve.reload(models, step)
        assert _answers(models) == expected
    with pytest.raises(Status, match="assign label to version 1 of model demo"):
        serve.reload(models, loaded)


def test_a_label_is_not_moved_to_a_version_that_is_not_there(serve):
    moved = _steps()[2]
    models = serve(_models_config())
    with pytest.raises(Status, match="assign label to version 2 of model demo"):
        serve.reload(models, moved)
    assert _answers(models) == {"stable": 1, "canary": None, None: 1}


def test_a_server_starts_with_labels_by_the_flag_alone(serve):
    for step in (_models_config(), *_steps()):
        serve(step)
        with pytest.raises(Status, match="not currently available for inference"):
            serve(step, allow=False)


def _yaml(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def _kubernetes():
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


def _flags(arguments):
    return dict(argument.removeprefix("--").split("=", 1) for argument in arguments)


def _serving():
    """The two ways of running the server: image and flags."""
    service = _yaml("docker-compose.yaml")["services"]["serving"]
    (container,) = _kubernetes()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return service, _flags(service["command"]), container, _flags(container["args"])


def test_compose_and_kubernetes_run_the_same_server():
    service, here, container, there = _serving()
    assert service["image"] == container["image"]
    assert service["entrypoint"] == container["command"] == ["tensorflow_model_server"]
    assert here.items() <= there.items()
    assert here["allow_version_labels_for_unavailable_models"] == "true"
    ports = {port["containerPort"] for port in container["ports"]}
    published = {port.split(":")[1] for port in service["ports"]}
    assert {str(port) for port in ports} == published == {here["port"], here["rest_api_port"]}


def test_what_is_mounted_is_there():
    for service in _yaml("docker-compose.yaml")["services"].values():
        mounts = dict(
            volume.split(":")[1::-1] for volume in service["volumes"] if "$" not in volume
        )
        for argument in service.get("command", []):
            flag, value = argument.split("=", 1)
            if flag.endswith("file"):
                folder = next(folder for folder in mounts if value.startswith(folder))
                assert (DEPLOY / mounts[folder] / pathlib.Path(value).relative_to(folder)).is_file()
        for source in mounts.values():
            assert (DEPLOY / source).is_dir()


def test_the_cluster_has_the_files_beside_its_manifest():
    kustomization = _yaml("kustomization.yaml")
    assert kustomization["resources"] == ["kubernetes.yaml"]
    (generator,) = kustomization["configMapGenerator"]
    # Without a hash in its name, or an edit would restart the servers.
    assert kustomization["generatorOptions"]["disableNameSuffixHash"] is True
    _, _, container, flags = _serving()
    spec = _kubernetes()["Deployment"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    folders = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert volumes[folders["/config"]]["configMap"]["name"] == generator["name"]
    needed = {pathlib.Path(value).name for flag, value in flags.items() if flag.endswith("_file")}
    assert needed == set(generator["files"])
    assert all((DEPLOY / name).is_file() for name in needed)
    assert "/models" in folders


def test_every_object_of_the_cluster_means_the_same_pods():
    kinds = _kubernetes()
    deployment = kinds["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert kinds["Service"]["spec"]["selector"] == labels
    assert kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = kinds["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert target["apiVersion"] == deployment["apiVersion"]
    # The autoscaler's, or the next apply would undo what it did.
    assert "replicas" not in deployment["spec"]
    rolling = deployment["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert {"requests", "limits"} == set(container["resources"])
    # Threads as many as the cores requested: it would count the node's.
    flags, cores = _flags(container["args"]), container["resources"]["requests"]["cpu"]
    assert flags["tensorflow_intra_op_parallelism"] == cores
    assert flags["tensorflow_inter_op_parallelism"] == cores


# Of tensorflow/serving model_servers/http_rest_api_util.cc: name, version, label, metadata.
STATUS_PATH = re.compile(
    r"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?(?:/(metadata))?"
)


def test_ready_is_the_stable_version_in_service():
    service, _, container, _ = _serving()
    (model,) = _models_config().model_config_list.config
    names = {port["name"] for port in container["ports"]}
    probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe")]
    assert {probe["port"] for probe in probes} == {"rest"} <= names
    (path,) = {probe["path"] for probe in probes}
    name, _, label, metadata = STATUS_PATH.fullmatch(path).groups()
    assert name == model.name
    assert label in model.version_labels
    # Without it the answer is 200 whatever the state.
    assert metadata
    assert f"GET {path} HTTP/1.0" in service["healthcheck"]["test"][-1]


@pytest.fixture(scope="module")
def deployed(models, start_server, tmp_path_factory):
    """Our own server, run with the flags and files of docker-compose.yaml.

    Gives a function that asks the REST port for a path, to status and text, and one that edits
    models.config.
    """
    folder = tmp_path_factory.mktemp("deployed")
    (folder / "demo").mkdir()
    os.symlink(models[0.0], folder / "demo" / "1")
    os.symlink(models[1.0], folder / "demo" / "2")

    def edit(config):
        config.model_config_list.config[0].base_path = str(folder / "demo")
        (folder / "edited").write_text(text_format.MessageToString(config))
        os.replace(folder / "edited", folder / "models.config")

    edit(_models_config())
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    _, flags, _, _ = _serving()
    flags |= {
        "rest_api_port": port,
        "model_config_file": folder / "models.config",
        "model_config_file_poll_wait_seconds": 0.1,
        "monitoring_config_file": DEPLOY / "monitoring.config",
    }
    # The last one counts, and the fixture's reader takes a free port's.
    flags["port"] = 0

    def get(path):
        with contextlib.closing(http.client.HTTPConnection("localhost", port, timeout=20)) as asked:
            asked.request("GET", path)
            response = asked.getresponse()
            return response.status, response.read().decode()

    with start_server(folder, *(f"--{flag}={value}" for flag, value in flags.items())):
        yield get, edit


def test_our_server_reads_these_files_and_tells_readiness(deployed):
    get, edit = deployed
    _, _, container, _ = _serving()
    ready = container["readinessProbe"]["httpGet"]["path"]
    canary = ready.replace("stable", "canary")
    assert get(ready)[0] == 200
    # No such label; and the status of a model, which says 200 for anything.
    assert get(canary)[0] == 400
    assert get("/v1/models/demo/labels/nonsense")[0] == 200
    loaded, labelled, moved, done = _steps()
    edit(loaded)
    wait_for(lambda: "AVAILABLE" in get("/v1/models/demo/versions/2")[1])
    assert json.loads(get(ready)[1])["model_spec"]["version"] == "1"
    edit(labelled)
    wait_for(lambda: get(canary)[0] == 200)
    assert json.loads(get(canary)[1])["model_spec"]["version"] == "2"
    edit(moved)
    wait_for(lambda: json.loads(get(ready)[1])["model_spec"]["version"] == "2")
    edit(done)
    wait_for(lambda: "END" in get("/v1/models/demo/versions/1")[1])
    # Metadata needs the version in service: what a probe must see.
    assert get("/v1/models/demo/versions/1/metadata")[0] == 404
    assert get(ready)[0] == 200


def test_our_server_exports_what_the_queries_read(deployed):
    get, _ = deployed
    assert get("/v1/models/demo/metadata")[0] == 200
    path = _yaml("prometheus/prometheus.yaml")["scrape_configs"][0]["metrics_path"]
    status, text = get(path)
    assert status == 200
    found = {}
    for name, labels in re.findall(r"^(:tensorflow[\w:]+)\{(.*?)\} ", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r"(\w+)=\"", labels))
    # It batches nothing, nobody has asked it for a prediction, and the model has no warm-up.
    expected = {
        name: labels
        for name, labels in SERIES.items()
        if not re.search("^up$|batching_session|runtime_latency|warmup", name)
    }
    assert expected == {name: found.get(name) for name in expected}


def _dashboard():
    return json.loads((DEPLOY / "grafana/dashboards/pwiser-serving.json").read_text())


def _queries():
    """Every PromQL expression, by where it is."""
    queries = {}
    for group in _yaml("prometheus/alerts.yaml")["groups"]:
        for rule in group["rules"]:
            queries[rule["alert"]] = rule["expr"]
    dashboard = _dashboard()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            queries[panel["title"], target["refId"]] = target["expr"]
    for variable in dashboard["templating"]["list"]:
        query = variable["query"]["query"]
        series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()
        queries[variable["name"]] = f"sum by ({label}) ({series})"
    return queries


def test_queries_name_what_the_server_exports():
    used = set()
    for place, query in _queries().items():
        names = set(re.findall(r"(?<![\w:])(:tensorflow[\w:]+|up\b)", query))
        assert names, place
        assert names <= set(SERIES), place
        used |= names
        for name, matchers in re.findall(r"(:tensorflow[\w:]+|up)\{(.*?)\}", query):
            labels = set(re.findall(r"(\w+)(?:=|!=|=~|!~)\"", matchers))
            assert labels <= SERIES[name] | TARGET_LABELS, place
        known = set.union(TARGET_LABELS, *(SERIES[name] for name in names))
        for labels in re.findall(r"(?:by|on) \((.*?)\)", query):
            assert set(labels.split(", ")) <= known, place
    # The list above has nothing that nobody reads.
    read = {name for name in COUNTERS if name in used} | {
        name for name in HISTOGRAMS if any(series.startswith(f"{name}_") for series in used)
    }
    assert read == set(COUNTERS) | set(HISTOGRAMS)


def test_no_query_takes_the_rate_of_a_sum():
    # TF Serving writes a histogram's sum with six digits.
    for place, query in _queries().items():
        assert not re.search(r"(rate|increase)\([\w:]+_sum\b", query), place


def test_quantiles_keep_their_buckets():
    for place, query in _queries().items():
        for labels in re.findall(r"histogram_quantile\([\d.]+, sum by \((.*?)\)", query):
            assert "le" in labels.split(", "), place
        assert query.count("histogram_quantile") == query.count("_bucket"), place


def test_alerts_say_what_is_the_matter():
    (group,) = _yaml("prometheus/alerts.yaml")["groups"]
    rules = group["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket")
        # A summary names labels that the expression leaves.
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            grouped = re.search(r"sum by \((.*?)\)", rule["expr"])
            assert not grouped or label in grouped[1].split(", ")


def test_prometheus_scrapes_the_server_and_keeps_what_is_read():
    config = _yaml("prometheus/prometheus.yaml")
    assert all((DEPLOY / "prometheus" / name).is_file() for name in config["rule_files"])
    (scrape,) = config["scrape_configs"]
    services = _yaml("docker-compose.yaml")["services"]
    _, flags, _, _ = _serving()
    for target in scrape["static_configs"][0]["targets"]:
        name, port = target.split(":")
        assert name in services
        assert port == flags["rest_api_port"]
    (keep,) = scrape["metric_relabel_configs"]
    assert keep["action"] == "keep"
    assert all(re.fullmatch(keep["regex"], name) for name in SERIES if name != "up")
    for query in _queries().values():
        assert all(job == scrape["job_name"] for job in re.findall(r'job="(.*?)"', query))


def test_the_dashboard_reads_the_provisioned_source():
    (source,) = _yaml("grafana/datasources/prometheus.yaml")["datasources"]
    services = _yaml("docker-compose.yaml")["services"]
    assert source["url"].removeprefix("http://").split(":")[0] in services
    (provider,) = _yaml("grafana/dashboards/folder.yaml")["providers"]
    ((_, mounted, _),) = [volume.split(":") for volume in services["grafana"]["volumes"]]
    assert provider["options"]["path"] == f"{mounted}/dashboards"
    dashboard = _dashboard()
    expected = {"type": source["type"], "uid": source["uid"]}
    assert all(variable["datasource"] == expected for variable in dashboard["templating"]["list"])
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        assert panel["datasource"] == expected
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"] == expected
            named = set(re.findall(r"\$(\w+)", target["expr"]))
            assert named <= variables | {"__rate_interval"}
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers)


def test_panels_do_not_overlap():
    cells = [
        (x, y)
        for panel in _dashboard()["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
