"""Statistics and metrics: real traffic, and what both say of it agrees with what was sent."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import echo_repository
import grpc
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from fronts import Call, GrpcFront, HttpFront, rpc
from prometheus_client.parser import text_string_to_metric_families
from running_server import RunningServer
from wire_values import Given

from headrace.core.statistics import ROWS_BUCKETS
from headrace.wire import pb

# The names that Triton's dashboards and tools read, but for those of a GPU, of decoupled models and of summaries.
TRITON_METRICS = {
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
    "nv_cache_num_hits_per_model",
    "nv_cache_num_misses_per_model",
    "nv_cache_hit_duration_per_model",
    "nv_cache_miss_duration_per_model",
    "nv_inference_pending_request_count",
    "nv_model_load_duration_secs",
    "nv_pinned_memory_pool_total_bytes",
    "nv_pinned_memory_pool_used_bytes",
    "nv_cpu_memory_total_bytes",
    "nv_cpu_memory_used_bytes",
    "nv_cpu_utilization",
}
MODEL_KEYS = {
    "name",
    "version",
    "last_inference",
    "inference_count",
    "execution_count",
    "inference_stats",
    "response_stats",
    "batch_stats",
    "memory_usage",
}
INFERENCE_KEYS = {
    "success",
    "fail",
    "queue",
    "compute_input",
    "compute_infer",
    "compute_output",
    "cache_hit",
    "cache_miss",
}
BATCH_KEYS = {"batch_size", "compute_input", "compute_infer", "compute_output"}
COMPUTE = ("compute_input", "compute_infer", "compute_output")
REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory):
    """A server with a model for each test, so that each knows everything that its own was sent."""
    repository = tmp_path_factory.mktemp("statistics")
    for name in ("mixed", "split", "kept", "keys", "clients"):
        _rows(repository, name, {"response_cache": True} if name in ("kept", "keys") else {})
    for name, delay_ms in (("batched", 150), ("late", 600)):
        _slow(repository, name, delay_ms)
    with RunningServer(repository) as running:
        yield running


def _rows(repository: Path, name: str, config: dict) -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1/model.py").write_text(echo_repository.ROWS)
    (repository / name / "config.yaml").write_text(json.dumps(config))


def _slow(repository: Path, name: str, delay_ms: int) -> None:
    (repository / name / "1").mkdir(parents=True)
    config = {
        "backend": "fake",
        "max_batch_size": 4,
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 1]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}],
        "parameters": {"fake_delay_ms": delay_ms},
    }
    (repository / name / "config.yaml").write_text(json.dumps(config))


@pytest.fixture
def http(counted: RunningServer):
    front = HttpFront(counted.http, binary=False, ordinary=False)
    yield front
    front.close()


@pytest.fixture
def grpc_front(counted: RunningServer):
    front = GrpcFront(counted.grpc, raw=True)
    yield front
    front.close()


@pytest.fixture
def channel(counted: RunningServer):
    with grpc.insecure_channel(counted.grpc) as opened:
        yield opened


def rows_call(model: str, rows: int, first: int = 0, id: str = "") -> Call:  # noqa: A002 - the protocol's name
    numbers = Given("numbers", "INT32", (rows, 2), tuple(range(first, first + 2 * rows)))
    texts = Given("texts", "BYTES", (rows, 1), (b"text",) * rows)
    return Call(model, (numbers, texts), id=id)


def bad_call(model: str) -> Call:
    return Call(model, (Given("numbers", "FP32", (1, 2), (1.0, 2.0)), Given("texts", "BYTES", (1, 1), (b"",))))


def stats(server: RunningServer, model: str) -> dict:
    """The statistics of a model that has one version, over HTTP."""
    status, body = server.get(f"/v2/models/{model}/stats")
    assert status == 200, body
    [one] = body["model_stats"]
    return one


def series(server: RunningServer) -> dict[tuple[str, frozenset], float]:
    """Every number of a scrape."""
    with urlopen(f"http://{server.metrics}/metrics", timeout=60) as response:
        text = response.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def check_agreement(server: RunningServer, model: str) -> dict:
    """Compare what statistics and metrics say of a model that nobody uses now; the statistics."""
    one = stats(server, model)
    found = series(server)

    def metric(name: str, **labels: str) -> float:
        wanted = frozenset({"model": model, "version": "1", **labels}.items())
        # The parser gives counters the suffix that the text does not have.
        values = [found[key, wanted] for key in (name, f"{name}_total") if (key, wanted) in found]
        assert len(values) == 1, (name, values)
        return values[0]

    inference, batches = one["inference_stats"], one["batch_stats"]
    assert metric("nv_inference_request_success") == inference["success"]["count"]
    failures = sum(metric("nv_inference_request_failure", reason=reason) for reason in REASONS)
    assert failures == inference["fail"]["count"]
    assert metric("nv_inference_count") == one["inference_count"]
    assert metric("nv_inference_exec_count") == one["execution_count"]
    assert metric("nv_inference_request_duration_us") == inference["success"]["ns"] // 1000
    assert metric("nv_inference_queue_duration_us") == inference["queue"]["ns"] // 1000
    for part in COMPUTE:
        assert metric(f"nv_inference_{part}_duration_us") == inference[part]["ns"] // 1000
    assert metric("headrace_request_duration_seconds_count") == inference["success"]["count"]
    assert metric("headrace_request_duration_seconds_sum") == pytest.approx(inference["success"]["ns"] * 1e-9)
    assert metric("headrace_queue_duration_seconds_count") == inference["queue"]["count"]
    assert metric("headrace_queue_duration_seconds_sum") == pytest.approx(inference["queue"]["ns"] * 1e-9)
    assert metric("headrace_batch_rows_count") == one["execution_count"]
    assert metric("headrace_batch_rows_sum") == one["inference_count"]
    assert metric("headrace_compute_duration_seconds_count") == one["execution_count"]
    compute_ns = sum(batch[part]["ns"] for batch in batches for part in COMPUTE)
    assert metric("headrace_compute_duration_seconds_sum") == pytest.approx(compute_ns * 1e-9)
    for bound in ROWS_BUCKETS:
        within = sum(batch[COMPUTE[0]]["count"] for batch in batches if batch["batch_size"] <= bound)
        assert metric("headrace_batch_rows_bucket", le=str(bound)) == within
    check_sums(one)
    return one


def check_sums(one: dict) -> None:
    """What holds of a model's statistics whatever was sent."""
    inference, batches = one["inference_stats"], one["batch_stats"]
    success, hits = inference["success"], inference["cache_hit"]
    assert inference["queue"]["count"] == success["count"]
    assert {inference[part]["count"] for part in COMPUTE} == {success["count"] - hits["count"]}
    assert sum(batch["batch_size"] * batch["compute_infer"]["count"] for batch in batches) == one["inference_count"]
    for part in COMPUTE:
        assert sum(batch[part]["count"] for batch in batches) == one["execution_count"]
        assert all(batch[part]["ns"] > 0 for batch in batches)
        assert (inference[part]["ns"] > 0) == (inference[part]["count"] > 0)
    parts = (*COMPUTE, "queue", "cache_hit")
    assert sum(inference[part]["ns"] for part in parts) <= success["ns"]
    assert (success["ns"] > 0) == (success["count"] > 0)
    for lookup in ("cache_hit", "cache_miss"):
        assert (inference[lookup]["ns"] > 0) == (inference[lookup]["count"] > 0)


def counts(one: dict) -> dict[str, int]:
    return {name: value["count"] for name, value in one["inference_stats"].items()}


def test_a_mix_of_good_and_bad_requests_over_both_protocols(counted, http, grpc_front):
    for _ in range(5):
        assert http.infer(rows_call("mixed", 1)).ok
    for _ in range(3):
        assert grpc_front.infer(rows_call("mixed", 2)).ok
    assert http.infer(bad_call("mixed")).status == 400
    assert http.infer(Call("mixed", ())).status == 400
    assert grpc_front.infer(bad_call("mixed")).status == "INVALID_ARGUMENT"
    for action in ("infer", "infer_stream", "generate", "generate_stream"):
        status, _ = counted.post(f"/v2/models/mixed/{action}", b"this is no JSON")
        assert status == 400
    one = check_agreement(counted, "mixed")
    assert counts(one) == {
        "success": 8,
        "fail": 7,
        "queue": 8,
        "compute_input": 8,
        "compute_infer": 8,
        "compute_output": 8,
        "cache_hit": 0,
        "cache_miss": 0,
    }
    assert (one["inference_count"], one["execution_count"]) == (11, 8)
    assert {batch["batch_size"]: batch["compute_infer"]["count"] for batch in one["batch_stats"]} == {1: 5, 2: 3}
    assert one["last_inference"] > 1_700_000_000_000
    assert one["response_stats"] == {}
    assert counted.metric("nv_inference_request_failure", model="mixed", reason="OTHER") == 7


def test_batches_count_once_and_their_times_once_for_each_request(counted):
    def send(number: int) -> bool:
        front = HttpFront(counted.http, binary=False, ordinary=False)
        try:
            return front.infer(Call("batched", (Given("x", "FP32", (1, 1), (float(number),)),))).ok
        finally:
            front.close()

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(send, range(12)))
    one = check_agreement(counted, "batched")
    assert counts(one)["success"] == one["inference_count"] == 12
    assert one["execution_count"] < 12
    assert max(batch["batch_size"] for batch in one["batch_stats"]) > 1
    for part in COMPUTE:  # every request has one row here
        by_request = sum(batch["batch_size"] * batch[part]["ns"] for batch in one["batch_stats"])
        assert one["inference_stats"][part]["ns"] == by_request
    assert all(
        batch["compute_infer"]["ns"] >= 150_000_000 * batch["compute_infer"]["count"] for batch in one["batch_stats"]
    )


def test_a_request_in_parts_is_one_request(counted, http):
    assert http.infer(rows_call("split", 10)).ok
    one = check_agreement(counted, "split")
    assert counts(one)["success"] == counts(one)["compute_infer"] == 1
    assert (one["inference_count"], one["execution_count"]) == (10, 3)
    assert {batch["batch_size"]: batch["compute_infer"]["count"] for batch in one["batch_stats"]} == {4: 2, 2: 1}


def test_a_request_that_ran_for_nobody_is_a_failure_and_an_execution(counted, http):
    late = Call("late", (Given("x", "FP32", (1, 1), (1.0,)),), parameters={"timeout": 300_000})
    assert http.infer(late).status in (503, 504)
    counted.wait_for(lambda: stats(counted, "late")["execution_count"])
    one = check_agreement(counted, "late")
    assert {name: number for name, number in counts(one).items() if number} == {"fail": 1}
    assert one["inference_stats"]["fail"]["ns"] >= 290_000_000  # it counts from a moment after the time-out does
    assert (one["inference_count"], one["execution_count"]) == (1, 1)
    assert one["batch_stats"][0]["compute_infer"]["ns"] >= 600_000_000


def test_answers_out_of_the_cache_are_successes_that_did_not_run(counted, http, grpc_front):
    first, second = rows_call("kept", 1, first=1), rows_call("kept", 2, first=1)
    fresh = [http.infer(first), http.infer(second)]
    again = [grpc_front.infer(first), http.infer(second), http.infer(rows_call("kept", 1, first=1, id="mine"))]
    assert all(answer.ok for answer in (*fresh, *again))
    assert [answer.outputs for answer in again] == [fresh[0].outputs, fresh[1].outputs, fresh[0].outputs]
    assert [answer.id for answer in again] == ["", "", "mine"]
    assert http.infer(bad_call("kept")).status == 400
    one = check_agreement(counted, "kept")
    assert counts(one) == {
        "success": 5,
        "fail": 1,
        "queue": 5,
        "compute_input": 2,
        "compute_infer": 2,
        "compute_output": 2,
        "cache_hit": 3,
        "cache_miss": 2,
    }
    assert (one["inference_count"], one["execution_count"]) == (3, 2)
    inference = one["inference_stats"]
    of_model = {"model": "kept", "version": "1"}
    assert counted.metric("nv_cache_num_hits_per_model", **of_model) == 3
    assert counted.metric("nv_cache_num_misses_per_model", **of_model) == 2
    assert counted.metric("nv_cache_hit_duration_per_model", **of_model) == inference["cache_hit"]["ns"] // 1000
    assert counted.metric("nv_cache_miss_duration_per_model", **of_model) == inference["cache_miss"]["ns"] // 1000
    assert counted.metric("headrace_cache_entries") >= 2
    assert counted.metric("headrace_cache_bytes") > 0
    assert counted.metric("headrace_cache_evictions_total") == 0


def test_every_key_is_there_and_both_protocols_have_the_same(counted, channel, http):
    assert http.infer(rows_call("keys", 1)).ok
    one = stats(counted, "keys")
    assert one.keys() == MODEL_KEYS
    assert one["inference_stats"].keys() == INFERENCE_KEYS
    [batch] = one["batch_stats"]
    assert batch.keys() == BATCH_KEYS
    durations = [*one["inference_stats"].values(), *(batch[part] for part in COMPUTE)]
    assert all(value.keys() == {"count", "ns"} for value in durations)
    [message] = rpc(channel, "ModelStatistics")(pb.ModelStatisticsRequest(name="keys", version="1")).model_stats
    assert {field.name for field in message.DESCRIPTOR.fields} == MODEL_KEYS
    for key in ("name", "version", "last_inference", "inference_count", "execution_count"):
        assert getattr(message, key) == one[key]
    for key, value in one["inference_stats"].items():
        sent = getattr(message.inference_stats, key)
        assert {"count": sent.count, "ns": sent.ns} == value
    [sent_batch] = message.batch_stats
    assert sent_batch.batch_size == batch["batch_size"]
    assert sent_batch.compute_infer.ns == batch["compute_infer"]["ns"]


def test_memory_is_that_of_the_workers_that_hold_the_model(counted):
    workers = {process.memory_info().rss for process in counted.workers()}
    [usage] = stats(counted, "clients")["memory_usage"]
    assert (usage["type"], usage["id"]) == ("CPU", 0)
    assert min(workers) * 0.5 < usage["byte_size"] < max(workers) * 1.5


def test_every_name_of_triton_is_in_the_metrics(counted):
    with urlopen(f"http://{counted.metrics}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    names = {line.partition("{")[0].partition(" ")[0] for line in lines if not line.startswith("#")}
    assert names >= TRITON_METRICS
    cached = {line.split('model="')[1].split('"')[0] for line in lines if line.startswith("nv_cache")}
    assert cached == {"kept", "keys"}


def test_all_models_one_model_and_one_version(counted, channel):
    everything = counted.get("/v2/models/stats?some=parameter")[1]["model_stats"]
    names = [one["name"] for one in everything]
    assert names == sorted(["mixed", "split", "kept", "keys", "clients", "batched", "late"])
    call = rpc(channel, "ModelStatistics")
    assert [one.name for one in call(pb.ModelStatisticsRequest()).model_stats] == names
    assert counted.get("/v2/models/clients/versions/1/stats") == counted.get("/v2/models/clients/stats")


@pytest.mark.parametrize("path", ["nobody/stats", "nobody/versions/1/stats", "clients/versions/2/stats"])
def test_what_is_not_served_is_a_bad_request_over_http(counted, path):
    status, body = counted.get(f"/v2/models/{path}")
    assert status == 400
    assert list(body) == ["error"]
    assert path.split("/")[0] in body["error"]


@pytest.mark.parametrize(("name", "version"), [("nobody", ""), ("nobody", "1"), ("clients", "2"), ("", "1")])
def test_what_is_not_served_is_a_bad_request_over_grpc(channel, name, version):
    with pytest.raises(grpc.RpcError) as caught:
        rpc(channel, "ModelStatistics")(pb.ModelStatisticsRequest(name=name, version=version))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_tritons_clients_read_them(counted):
    with triton_http.InferenceServerClient(counted.http) as client:
        over_http = client.get_inference_statistics("clients")
        assert len(client.get_inference_statistics()["model_stats"]) == 7
    with triton_grpc.InferenceServerClient(counted.grpc) as client:
        over_grpc = client.get_inference_statistics("clients", as_json=True)
    assert over_http["model_stats"][0]["name"] == over_grpc["model_stats"][0]["name"] == "clients"
    assert over_http["model_stats"][0]["inference_stats"].keys() == INFERENCE_KEYS
