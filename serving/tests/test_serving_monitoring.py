"""monitoring: what is counted, and its text as Prometheus reads it."""

import threading

import grpc
import prometheus_client.parser
import pytest
from pwiser_serving.server import monitoring as rooms
from pwiser_serving.server.status import Status, not_found


@pytest.fixture
def monitoring():
    return rooms.Monitoring()


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(rooms, "time", clock)
    return clock


def samples(monitoring) -> dict:
    """Each sample's value by its name and, sorted, its labels' values; types by family name."""
    values, types = {}, {}
    for family in prometheus_client.parser.text_string_to_metric_families(monitoring.text()):
        types[family.name] = family.type
        for sample in family.samples:
            labels = (f"{name}={value}" for name, value in sorted(sample.labels.items()))
            # The parser puts _total behind every counter's name.
            key = (sample.name.removesuffix("_total"), *labels)
            assert key not in values
            values[key] = sample.value
    return values, types


def answer(monitoring, error=None, name="m", api="Predict", entrypoint="GRPC"):
    with monitoring.request(name, api, entrypoint):
        if error is not None:
            raise error


def test_names_and_types_are_tensorflow_servings(monitoring):
    answer(monitoring)

    _, types = samples(monitoring)
    assert ':tensorflow:serving:request_count{model_name="m",status="OK"} 1\n' in monitoring.text()
    assert types == {
        ":tensorflow:cc:saved_model:load_attempt_count": "counter",
        ":tensorflow:cc:saved_model:load_latency": "counter",
        ":tensorflow:serving:model_warmup_latency": "histogram",
        ":tensorflow:serving:model_warmup_records_read": "counter",
        ":tensorflow:serving:request_count": "counter",
        ":tensorflow:serving:request_latency": "histogram",
        ":tensorflow:serving:runtime_latency": "histogram",
    }


def test_a_request_is_counted_by_its_status_and_timed_where_it_succeeds(monitoring, clock):
    with monitoring.request("m", "Predict", "GRPC"):
        clock.now += 0.001
    for error in (not_found("x"), not_found("y"), KeyError("a fault")):
        with pytest.raises(type(error)):
            answer(monitoring, error)

    values, _ = samples(monitoring)
    count = ":tensorflow:serving:request_count"
    latency = ":tensorflow:serving:request_latency"
    labels = ("API=Predict", "entrypoint=GRPC")
    assert values[count, "model_name=m", "status=OK"] == 1
    assert values[count, "model_name=m", "status=NOT_FOUND"] == 2
    assert values[count, "model_name=m", "status=INTERNAL"] == 1
    assert values[latency + "_count", *labels, "model_name=m"] == 1
    assert values[latency + "_sum", *labels, "model_name=m"] == pytest.approx(1000)
    # 10 * 1.8^7 = 612 and 10 * 1.8^8 = 1102 microseconds.
    assert values[latency + "_bucket", *labels, "le=612.22", "model_name=m"] == 0
    assert values[latency + "_bucket", *labels, "le=1102", "model_name=m"] == 1
    assert values[latency + "_bucket", *labels, "le=+Inf", "model_name=m"] == 1


@pytest.mark.parametrize("code", list(grpc.StatusCode)[1:])
def test_every_code_has_its_name(monitoring, code):
    with pytest.raises(Status):
        answer(monitoring, Status(code, ""))

    values, _ = samples(monitoring)
    assert values[":tensorflow:serving:request_count", "model_name=m", f"status={code.name}"] == 1


def test_the_model_alone_loads_and_warm_up(monitoring):
    monitoring.runtime("m", "Predict", 5e-6)
    monitoring.runtime("m", "Predict", 1e6)
    monitoring.loaded("/models/m/7", 1.5, success=True)
    monitoring.loaded("/models/m/8", 0.5, success=False)
    monitoring.warmed_up("/models/m/7", 0.25, records=3)

    values, _ = samples(monitoring)
    runtime = ":tensorflow:serving:runtime_latency_bucket"
    seven, labels = "model_path=/models/m/7", ("model_name=m", "runtime=TF1")
    assert values[runtime, "API=Predict", "le=10", *labels] == 1
    # A million seconds are beyond the last bound.
    bounds = [key for key in values if key[0] == runtime and "+Inf" not in key[2]]
    assert len(bounds) == 33
    assert {values[key] for key in bounds} == {1}
    assert values[runtime, "API=Predict", "le=+Inf", *labels] == 2
    loads = ":tensorflow:cc:saved_model:load_"
    assert values[loads + "attempt_count", seven, "status=success"] == 1
    assert values[loads + "attempt_count", "model_path=/models/m/8", "status=fail"] == 1
    assert values[loads + "latency", seven] == 1_500_000
    assert (loads + "latency", "model_path=/models/m/8") not in values
    warm_up = ":tensorflow:serving:model_warmup_"
    assert values[warm_up + "records_read", seven, "status=OK"] == 3
    assert values[warm_up + "latency_sum", seven, "status=OK"] == pytest.approx(250_000)


def test_a_name_from_a_request_cannot_break_the_text(monitoring):
    name = 'a "quoted"\\ name\n:tensorflow:serving:request_count{model_name="m"} 9'
    answer(monitoring, name=name)

    values, _ = samples(monitoring)
    assert values[":tensorflow:serving:request_count", f"model_name={name}", "status=OK"] == 1


def test_names_of_models_that_do_not_exist_cannot_fill_the_memory(monitoring):
    answer(monitoring, name="m")
    for number in range(5000):
        with pytest.raises(Status):
            answer(monitoring, not_found(""), name=f"unknown {number}")
    with pytest.raises(Status):
        answer(monitoring, not_found(""), name="x" * 10_000_000)
    # A model that is in service keeps its own count, and so does one that comes late.
    with pytest.raises(Status):
        answer(monitoring, not_found(""), name="m")
    answer(monitoring, name="late")

    values, _ = samples(monitoring)
    count = ":tensorflow:serving:request_count"
    assert values[count, "model_name=m", "status=NOT_FOUND"] == 1
    assert values[count, "model_name=late", "status=OK"] == 1
    assert values[count, "model_name=", "status=NOT_FOUND"] == 4002
    assert len(monitoring.text()) < 200_000


def test_nothing_is_lost_between_threads(monitoring):
    def count():
        for _ in range(5000):
            answer(monitoring)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        samples(monitoring)
    for thread in threads:
        thread.join()

    values, _ = samples(monitoring)
    assert values[":tensorflow:serving:request_count", "model_name=m", "status=OK"] == 20_000
    latency = ":tensorflow:serving:request_latency_count"
    assert values[latency, "API=Predict", "entrypoint=GRPC", "model_name=m"] == 20_000
