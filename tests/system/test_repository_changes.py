"""The models of a running server change: by their folder (poll), by request (explicit), or not at all (none)."""

import base64
import json
import os
import re
import shutil
import threading
import time

import grpc
import pytest
from running_server import RunningServer
from system.load import (
    ECHO,
    Load,
    broken_onnx,
    copy_in,
    fake_model,
    gated_model,
    infer,
    infer_body,
    onnx_model,
    python_model,
    replace,
    wait_for,
)

from headrace.wire import pb

SOON_S = 60  # what "within seconds" may take on a busy machine
STILL_S = 0.5  # a folder that is left alone for 0.6 s counts as whole


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    path = tmp_path_factory.mktemp("polled")
    fake_model(path, "settled")
    return path


@pytest.fixture(scope="module")
def server(repository):
    with RunningServer(repository) as running:
        yield running


@pytest.fixture
def name(request):
    """A model name of the test's own."""
    return re.sub(r"\W", "_", request.node.name).removeprefix("test_")


def entry(server, name, version=""):
    """One line of the index, or None."""
    status, entries = server.post("/v2/repository/index")
    assert status == 200
    found = [one for one in entries if one["name"] == name and one.get("version", "") == version]
    assert len(found) <= 1
    return found[0] if found else None


def state(server, name, version="1"):
    return (entry(server, name, version) or {}).get("state")


def soon(server, condition, timeout_s=SOON_S):
    return server.wait_for(condition, timeout_s)


def added(values, version):
    """What a model of ``onnx_model`` answers: each version adds its number."""
    return [value + float(version) for value in values]


# -- poll ------------------------------------------------------------------------------------------------------------


def test_a_folder_copied_in_is_served_and_one_removed_is_gone(server, repository, name, tmp_path):
    before = {worker.pid for worker in server.workers()}
    copy_in(python_model(tmp_path, name), repository)  # which shares its worker with nobody
    soon(server, lambda: server.model_ready(name))
    assert infer(server.http, name, [1.0, 2.0]).values == [1.0, 2.0]
    own = {worker.pid for worker in server.workers()} - before
    assert own
    for path in sorted((repository / name).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (repository / name).rmdir()
    soon(server, lambda: infer(server.http, name, [1.0]).status == 404)
    soon(server, lambda: entry(server, name, "1") is None)
    soon(server, lambda: not own & {worker.pid for worker in server.workers()})
    assert infer(server.http, "settled", [1.0]).ok


def test_a_folder_moved_in_and_out_at_once(server, repository, name, tmp_path):
    folder = python_model(tmp_path, name)
    folder.rename(repository / name)
    soon(server, lambda: server.model_ready(name))
    (repository / name).rename(folder)
    soon(server, lambda: infer(server.http, name, [1.0]).status == 404)


def test_a_repository_with_a_relative_path_is_followed(tmp_path):
    fake_model(tmp_path, "first")
    with RunningServer(os.path.relpath(tmp_path)) as server:
        fake_model(tmp_path, "second")
        soon(server, lambda: server.model_ready("second"))


def test_a_repository_behind_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fake_model(tmp_path / "real", "first")
    with RunningServer(tmp_path / "link") as server:
        fake_model(tmp_path / "real", "second")
        soon(server, lambda: server.model_ready("second"))


def test_version_2_under_load_and_a_broken_version_3(server, repository, name):
    onnx_model(repository, name, version=1)
    soon(server, lambda: server.model_ready(name))
    with Load(server, name, http=6, grpc=2, expected=added) as load:
        load.wait_answers(100)
        onnx_model(repository, name, version=2)
        wait_for(lambda: {one.version for one in load.outcomes[-16:]} == {"2"}, what="version 2 alone")
        load.wait_answers(100)
        broken_onnx(repository, name, version=3)
        soon(server, lambda: state(server, name, "3") == "UNAVAILABLE")
        load.wait_answers(200)
        load.stop()
    assert not load.failed
    assert {one.version for one in load.outcomes} == {"1", "2"}
    answered_at = min(one.ended_at for one in load.outcomes if one.version == "2")
    assert {one.version for one in load.outcomes if one.sent_at > answered_at} == {"2"}
    assert re.search("model.onnx|protobuf", entry(server, name, "3")["reason"])
    assert state(server, name, "2") == "READY"
    status, answer = server.post(f"/v2/models/{name}/versions/3/infer", infer_body([1.0]))
    assert status == 503
    assert "not at ready state" in answer["error"]
    soon(server, lambda: state(server, name, "1") in (None, "UNAVAILABLE"))
    onnx_model(repository, name, version=4)
    soon(server, lambda: infer(server.http, name, [1.0]).version == "4")


def test_a_version_replaced_in_place_under_load(server, repository, name):
    folder = onnx_model(repository, name, add=1)
    better = onnx_model(repository.parent / "staged", name, add=2)
    soon(server, lambda: server.model_ready(name))
    either = threading.Event()

    def expected(values, _):
        return [value + (2.0 if either.is_set() else 1.0) for value in values]

    with Load(server, name, http=4, grpc=2, expected=expected) as load:
        load.wait_answers(50)
        replace(folder / "1", "model.onnx", (better / "1" / "model.onnx").read_bytes())
        soon(server, lambda: infer(server.http, name, [1.0]).values == [3.0])
        either.set()
        noted_at = time.monotonic()
        load.wait_answers(50)
        load.stop()
    # Those that were sent before the test took note of the change may have either answer, and nothing else.
    assert {one.status for one in load.failed} <= {"wrong"}
    assert all(one.sent_at < noted_at for one in load.failed)


def test_the_newest_version_removed_goes_back_to_the_one_before(server, repository, name, tmp_path):
    onnx_model(repository, name, version=1)
    onnx_model(repository, name, version=2)
    soon(server, lambda: infer(server.http, name, [0.0]).values == [2.0])
    with Load(server, name, http=4, expected=added) as load:
        (repository / name / "2").rename(tmp_path / "2")
        wait_for(lambda: {one.version for one in load.outcomes[-8:]} == {"1"}, what="version 1 alone")
        load.stop()
    assert not load.failed


@pytest.mark.parametrize("kind", ["onnx", "python"])
def test_a_slow_copy_is_never_served_half(server, repository, tmp_path, name, kind):
    if kind == "onnx":
        source, file = onnx_model(tmp_path, name), "model.onnx"
        content, answer = (source / "1" / file).read_bytes(), [2.0]
    else:  # every piece of it is a whole program, so only its size tells that something is missing
        content = ECHO.replace('inputs["x"]', 'inputs["x"] + BIAS').encode()
        content = b"".join(b"BIAS = %d\n" % number for number in range(16)) + b"if True:\n" + content
        file, answer = "model.py", [16.0]
    for attempt in range(5):  # a machine that stands still itself for so long makes it a finished copy
        called = f"{name}_{attempt}"
        longest_s, seen = watched_copy(server, repository / called / "1" / file, content)
        if longest_s < STILL_S:
            break
    assert longest_s < STILL_S
    assert infer(server.http, called, [1.0]).values == answer
    assert {one.status for one, _ in seen} <= {404, 503, 200}
    assert all(one.values == answer for one, _ in seen if one.ok)
    assert "UNAVAILABLE" not in {state for _, state in seen}, "nobody tried to load a part of it"


def watched_copy(server, path, content):
    """Write a model's file piece by piece: the longest time without a change, and what a client saw meanwhile."""
    name = path.parents[1].name
    seen = []
    watching = threading.Event()

    def watch():
        while not watching.wait(0.03):
            seen.append((infer(server.http, name, [1.0]), state(server, name)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        path.parent.mkdir(parents=True)
        size = len(content) // 15 + 1
        longest_s, written_at = 0.0, time.monotonic()
        with path.open("wb") as out:
            for start in range(0, len(content), size):
                out.write(content[start : start + size])
                out.flush()
                longest_s, written_at = max(longest_s, time.monotonic() - written_at), time.monotonic()
                time.sleep(0.2)  # a slow disk or network, not a wait
        soon(server, lambda: server.model_ready(name))
    finally:
        watching.set()
        watcher.join()
    return longest_s, seen


def test_config_edits_are_followed_and_broken_ones_are_not(server, repository, name):
    folder = fake_model(repository, name, "max_batch_size: 4\n")
    soon(server, lambda: server.model_ready(name))

    def max_batch_size():
        return server.get(f"/v2/models/{name}/config")[1]["max_batch_size"]

    assert max_batch_size() == 4
    with Load(server, name, http=4) as load:
        replace(folder, "config.yaml", "backend: fake\nmax_batch_size: 8\n")
        soon(server, lambda: max_batch_size() == 8)
        replace(folder, "config.yaml", "backend: fake\nmax_batch_size: many\nno_such_key: 1\n")
        broken = soon(server, lambda: (found := entry(server, name)) and found.get("state") and found)
        assert "max_batch_size" in broken["reason"]
        assert "no_such_key" in broken["reason"]
        assert state(server, name) == "READY"
        assert max_batch_size() == 8
        load.wait_answers(20)
        replace(folder, "config.yaml", "backend: fake\nmax_batch_size: 16\n")
        soon(server, lambda: max_batch_size() == 16)
        assert entry(server, name) is None, "the problem is gone"
        load.stop()
    assert not load.failed


def test_a_config_that_asks_for_what_cannot_be_loaded_leaves_the_old_one(server, repository, name):
    folder = fake_model(repository, name)
    soon(server, lambda: server.model_ready(name))
    with Load(server, name, http=4) as load:
        replace(folder, "config.yaml", "backend: fake\nparameters: {fake_load_fail: out of memory}\n")
        soon(server, lambda: "out of memory" in entry(server, name, "1").get("reason", ""))
        assert state(server, name) == "READY"
        load.wait_answers(20)
        load.stop()
    assert not load.failed


def test_a_broken_model_that_is_mended_is_served(server, repository, name, tmp_path):
    broken_onnx(repository, name)
    soon(server, lambda: state(server, name) == "UNAVAILABLE")
    good = onnx_model(tmp_path, name)
    replace(repository / name / "1", "model.onnx", (good / "1" / "model.onnx").read_bytes())
    soon(server, lambda: server.model_ready(name))
    assert entry(server, name, "1")["reason"] == ""


def test_a_second_version_beside_the_first(server, repository, name):
    folder = onnx_model(repository, name, version=1, config="versions: all\n")
    soon(server, lambda: server.model_ready(name))
    onnx_model(repository, name, version=3)
    soon(server, lambda: server.get(f"/v2/models/{name}/versions/3/ready")[0] == 200)
    for version, answer in (("1", [1.0]), ("3", [3.0])):
        _, body = server.post(f"/v2/models/{name}/versions/{version}/infer", infer_body([0.0]))
        assert body["outputs"][0]["data"] == answer
        assert body["model_version"] == version
    assert infer(server.http, name, [0.0]).version == "3"
    assert server.get(f"/v2/models/{name}")[1]["versions"] == ["1", "3"]
    replace(folder, "config.yaml", "versions: {only: [1]}\n")
    soon(server, lambda: infer(server.http, name, [0.0]).version == "1")


def test_hidden_and_temporary_folders_are_no_models(server, repository):
    for name in (".hidden", "half.tmp", "half.part"):
        fake_model(repository, name)
    fake_model(repository, "visible")
    soon(server, lambda: server.model_ready("visible"))
    assert not {".hidden", "half.tmp", "half.part"} & set(server.get("/v2/models")[1]["models"])


# -- ensembles -------------------------------------------------------------------------------------------------------


def ensemble(repository, name, first, second):
    """A model that gives what ``first`` answers to ``second``."""
    staged = repository / f".{name}.new"
    staged.mkdir()
    (staged / "config.yaml").write_text(
        "ensemble:\n"
        f"- {{model: {first}, inputs: {{x: x}}, outputs: {{y: between}}}}\n"
        f"- {{model: {second}, inputs: {{x: between}}, outputs: {{y: y}}}}\n"
    )
    return staged.rename(repository / name)


def test_an_ensemble_follows_its_models(server, repository, name, tmp_path):
    onnx_model(repository, f"{name}_1", add=1)
    ensemble(repository, name, f"{name}_1", f"{name}_2")
    soon(server, lambda: state(server, name) == "UNAVAILABLE")
    assert f"its model '{name}_2' is not served" in entry(server, name, "1")["reason"]
    assert infer(server.http, name, [1.0]).status == 404
    onnx_model(repository, f"{name}_2", add=10)
    soon(server, lambda: server.model_ready(name))
    assert infer(server.http, name, [1.0]).values == [12.0]
    with Load(server, name, http=4, grpc=2, expected=lambda values, _: [value + 11.0 for value in values]) as load:
        load.wait_answers(50)
        onnx_model(repository, f"{name}_2", version=2, add=10)  # the like of it takes its place
        soon(server, lambda: server.get(f"/v2/models/{name}_2")[1]["versions"] == ["2"])
        load.wait_answers(50)
        load.stop()
    assert not load.failed
    (repository / f"{name}_2").rename(tmp_path / "gone")
    soon(server, lambda: state(server, name) == "UNAVAILABLE")
    assert infer(server.http, name, [1.0]).status == 404
    (tmp_path / "gone").rename(repository / f"{name}_2")
    soon(server, lambda: infer(server.http, name, [1.0]).values == [12.0])
    assert state(server, name) == "READY"


def test_an_ensemble_from_the_start(tmp_path):
    onnx_model(tmp_path, "last", add=2)
    ensemble(tmp_path, "early", "last", "last")
    (tmp_path / "triton" / "1").mkdir(parents=True)
    (tmp_path / "triton" / "config.pbtxt").write_text("""
        platform: "ensemble"
        input { name: "x" data_type: TYPE_FP32 dims: [ -1, -1 ] }
        output { name: "y" data_type: TYPE_FP32 dims: [ -1, -1 ] }
        ensemble_scheduling { step { model_name: "early" model_version: -1
            input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }
    """)
    with RunningServer(tmp_path) as server:
        assert "is not served" not in server.output
        assert infer(server.http, "triton", [1.0]).values == [5.0]
        config = server.get("/v2/models/triton/config")[1]
        assert config["ensemble_scheduling"]["step"][0]["input_map"] == {"x": "x"}
        assert server.get("/v2/models/early")[1]["platform"] == "ensemble"
        assert server.stop() == 0


# -- explicit --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explicit(tmp_path_factory):
    repository = tmp_path_factory.mktemp("explicit")
    fake_model(repository, "initial")
    fake_model(repository, "idle")
    with RunningServer(repository, "--model-control", "explicit", "--load-model", "initial") as running:
        yield running


class OverHttp:
    """Model control as HTTP has it."""

    def __init__(self, server):
        self._server = server

    def _change(self, name, what):
        status, answer = self._server.post(f"/v2/repository/models/{name}/{what}", {})
        return "" if status == 200 else f"{status} {answer['error']}"

    def load(self, name):
        return self._change(name, "load")

    def unload(self, name):
        return self._change(name, "unload")

    def close(self):
        pass


class OverGrpc:
    """Model control as gRPC has it, with HTTP's numbers for the codes."""

    CODES = {"NOT_FOUND": 404, "INVALID_ARGUMENT": 400, "UNAVAILABLE": 503}  # noqa: RUF012

    def __init__(self, server):
        self._channel = grpc.insecure_channel(server.grpc, options=[("grpc.use_local_subchannel_pool", 1)])

    def _change(self, name, what):
        rpc = pb.RPCS[f"RepositoryModel{what}"]
        call = self._channel.unary_unary(
            f"/{pb.SERVICE}/RepositoryModel{what}", rpc.request.SerializeToString, rpc.response.FromString
        )
        try:
            call(rpc.request(model_name=name), timeout=60)
        except grpc.RpcError as error:
            return f"{self.CODES[error.code().name]} {error.details()}"
        return ""

    def load(self, name):
        return self._change(name, "Load")

    def unload(self, name):
        return self._change(name, "Unload")

    def close(self):
        self._channel.close()


@pytest.fixture(params=[OverHttp, OverGrpc])
def control(request, explicit):
    made = request.param(explicit)
    yield made
    made.close()


def test_only_the_named_models_are_loaded_at_start(explicit):
    assert explicit.model_ready("initial")
    assert not explicit.model_ready("idle")
    assert entry(explicit, "idle") == {"name": "idle"}
    assert infer(explicit.http, "idle", [1.0]).status == 404


def test_load_unload_and_load_again(explicit, control, name):
    onnx_model(explicit.repository, name)
    assert control.load(name) == ""
    assert infer(explicit.http, name, [1.0]).values == [2.0]
    assert control.unload(name) == ""
    assert infer(explicit.http, name, [1.0]).status == 404
    explicit.wait_for(lambda: state(explicit, name) == "UNAVAILABLE", SOON_S)
    assert entry(explicit, name, "1")["reason"] == "unloaded"
    assert control.unload(name) == "", "what is asked for is so already"
    assert control.load(name) == ""
    assert infer(explicit.http, name, [1.0]).ok


def test_changes_on_disk_wait_for_a_load(explicit, control, name):
    onnx_model(explicit.repository, name, version=1)
    assert control.load(name) == ""
    onnx_model(explicit.repository, name, version=2)
    with Load(explicit, name, http=4, grpc=2, expected=added) as load:
        load.wait_answers(50)
        assert {one.version for one in load.outcomes} == {"1"}
        assert control.load(name) == ""
        assert infer(explicit.http, name, [1.0]).version == "2", "a load has answered when the new version serves"
        load.wait_answers(20)
        load.stop()
    assert not load.failed


def test_a_load_that_fails_says_why_and_leaves_the_old_version(explicit, control, name):
    broken_onnx(explicit.repository, name)
    answer = control.load(name)
    assert answer.startswith(f"400 load failed for model '{name}'")
    assert re.search("model.onnx|protobuf", answer)
    onnx_model(explicit.repository, name, version=2)
    assert control.load(name) == ""
    broken_onnx(explicit.repository, name, version=3)
    assert control.load(name).startswith("400 ")
    assert infer(explicit.http, name, [1.0]).version == "2"


def test_what_is_not_there_cannot_be_loaded(control):
    assert control.load("nowhere").startswith("404 failed to load 'nowhere'")
    assert control.unload("nowhere").startswith("404 failed to unload 'nowhere'")
    assert control.load("../initial").startswith(("404 ", "501 "))


def test_unload_answers_what_was_accepted(explicit, control, name):
    gate = gated_model(explicit.repository, name)
    assert control.load(name) == ""
    outcomes = []
    threads = [
        threading.Thread(target=lambda value=value: outcomes.append(infer(explicit.http, name, [value])))
        for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    ]
    labels = {"model": name}
    with gate.shut():
        for thread in threads:
            thread.start()
        explicit.wait_for(
            lambda: (
                explicit.metric("headrace_queue_requests", **labels)
                + explicit.metric("headrace_executing_batches", **labels)
                == 6
            )
        )
        assert control.unload(name) == ""
        refused = infer(explicit.http, name, [9.0])
        assert refused.status in (404, 503)
    for thread in threads:
        thread.join()
    assert [one.status for one in outcomes] == [200] * 6, outcomes


def test_a_load_brings_back_a_model_whose_worker_could_not(explicit, control, name, tmp_path):
    """Its worker died, and the new one refused to load it: to load it again is what an operator will try."""
    closed = tmp_path / "closed"
    code = f"from pathlib import Path\nif Path({str(closed)!r}).exists():\n    raise RuntimeError('closed')\n"
    python_model(explicit.repository, name, code + "if True:" + ECHO)
    others = {worker.pid for worker in explicit.workers()}
    assert control.load(name) == ""
    closed.touch()
    for worker in explicit.workers():
        if worker.pid not in others:
            worker.kill()
    explicit.wait_for(lambda: "closed" in entry(explicit, name, "1")["reason"], SOON_S)
    assert infer(explicit.http, name, [1.0]).status == 503
    closed.unlink()
    assert control.load(name) == ""
    assert infer(explicit.http, name, [1.0]).ok


def test_what_a_restarted_worker_finds_changed_is_not_answered_out_of_the_cache(explicit, name):
    file = python_model(explicit.repository, name, config="response_cache: true\n") / "1" / "model.py"
    others = {worker.pid for worker in explicit.workers()}
    assert OverHttp(explicit).load(name) == ""
    assert infer(explicit.http, name, [1.0]).values == [1.0]
    file.write_text(file.read_text().replace('inputs["x"]}', 'inputs["x"] + 10}'))
    assert infer(explicit.http, name, [1.0]).values == [1.0], "nobody has asked for the change"
    assert explicit.metric("nv_cache_num_hits_per_model", model=name) == 1
    for worker in explicit.workers():
        if worker.pid not in others:
            worker.kill()
    explicit.wait_for(lambda: explicit.metric("headrace_worker_deaths_total", model=name) == 1)
    explicit.wait_for(lambda: explicit.model_ready(name), SOON_S)
    for hits in (1, 2):
        assert infer(explicit.http, name, [1.0]).values == [11.0]
        assert explicit.metric("nv_cache_num_hits_per_model", model=name) == hits


def test_an_ensemble_brings_its_models_and_takes_them_along(explicit, control, name):
    onnx_model(explicit.repository, f"{name}_1", add=1)
    onnx_model(explicit.repository, f"{name}_2", add=10)
    ensemble(explicit.repository, name, f"{name}_1", f"{name}_2")
    assert control.load(f"{name}_1") == ""
    assert control.load(name) == ""
    assert infer(explicit.http, name, [1.0]).values == [12.0]
    assert explicit.post(f"/v2/repository/models/{name}/unload", {"parameters": {"unload_dependents": True}})[0] == 200
    assert infer(explicit.http, name, [1.0]).status == 404
    assert infer(explicit.http, f"{name}_2", [1.0]).status == 404
    assert infer(explicit.http, f"{name}_1", [1.0]).ok, "it was asked for by itself"


# -- what load requests bring along ------------------------------------------------------------------------------------

OVERRIDE = json.dumps({"backend": "onnxruntime", "max_batch_size": "7", "version_policy": {"all": {}}})


@pytest.fixture
def overridden(tmp_path):
    """A server whose temporary files have a folder of their own, and that folder."""
    private = tmp_path / "private"
    private.mkdir()
    (tmp_path / "models").mkdir()
    with RunningServer(tmp_path / "models", "--model-control", "explicit", env={"TMPDIR": str(private)}) as running:
        yield running, private


def load_with(server, name, config, files):
    """A load request with an override: empty, or the status and what was wrong."""
    encoded = {f"file:{place}": base64.b64encode(content).decode() for place, content in files.items()}
    parameters = {"config": config, **encoded} if config else encoded
    status, answer = server.post(f"/v2/repository/models/{name}/load", {"parameters": parameters})
    return "" if status == 200 else f"{status} {answer['error']}"


def test_models_that_load_requests_bring(overridden, tmp_path):
    server, private = overridden
    contents = {
        number: (onnx_model(tmp_path / "staged", f"m{number}", add=number) / "1" / "model.onnx").read_bytes()
        for number in (1, 2)
    }
    assert load_with(server, "m", OVERRIDE, {f"{number}/model.onnx": contents[number] for number in (1, 2)}) == ""
    assert infer(server.http, "m", [0.0]).values == [2.0]
    assert server.get("/v2/models/m")[1]["versions"] == ["1", "2"]
    assert server.get("/v2/models/m/config")[1]["max_batch_size"] == 7
    assert {state(server, "m", version) for version in "12"} == {"READY"}
    kept = [path for path in private.iterdir() if path.name.startswith("headrace-load-")]
    assert len(kept) == 1
    with Load(server, "m", http=4, expected=lambda values, _: [value + 2.0 for value in values]) as load:
        load.wait_answers(20)
        for config, files, status in (
            (OVERRIDE, {"2/model.onnx": b"this is no model"}, "400 load failed for model 'm'"),
            (OVERRIDE, {"2/../../model.onnx": contents[1]}, "400 failed to load 'm': Invalid file path '2/"),
            ('{"max_bach_size": 3}', {"2/model.onnx": contents[1]}, "400 failed to load 'm': config: "),
            ("", {"2/model.onnx": contents[1]}, "400 "),
        ):
            assert load_with(server, "m", config, files).startswith(status)
        server.kill_workers()  # the files are still there for the next one
        server.wait_for(lambda: server.model_ready("m"))
        load.stop()
    assert not load.failed
    server.wait_for(lambda: [*private.glob("headrace-load-*")] == kept, SOON_S)
    assert server.post("/v2/repository/models/m/unload", {})[0] == 200
    server.wait_for(lambda: not [*private.glob("headrace-load-*")], SOON_S)
    assert server.post("/v2/repository/models/m/load", {})[0] == 404


def test_a_configuration_alone_holds_until_the_next_load(overridden, tmp_path):
    server, private = overridden
    onnx_model(server.repository, "m", add=1)

    def max_batch_size():
        return server.get("/v2/models/m/config")[1]["max_batch_size"]

    assert load_with(server, "m", '{"max_batch_size": 3}', {}) == ""
    assert max_batch_size() == 3
    assert infer(server.http, "m", [1.0]).values == [2.0]
    assert server.post("/v2/repository/models/m/load", {})[0] == 200
    assert max_batch_size() != 3
    assert load_with(server, "m", OVERRIDE, {"9/model.onnx": (server.repository / "m/1/model.onnx").read_bytes()}) == ""
    shutil.rmtree(server.repository / "m")
    assert infer(server.http, "m", [1.0]).version == "9"
    assert server.stop() == 0
    assert not [*private.glob("headrace-load-*")], "nothing is left behind"


# -- none, and control that is off -------------------------------------------------------------------------------------


def test_none_serves_what_was_there_at_start(tmp_path):
    fake_model(tmp_path, "first")
    with RunningServer(tmp_path, "--model-control", "none") as server:
        for control in (OverHttp(server), OverGrpc(server)):
            for answer in (control.load("first"), control.unload("first")):
                assert answer.startswith("503 explicit model load / unload is not allowed")
                assert "none" in answer
            control.close()
        assert infer(server.http, "first", [1.0]).ok


def test_polling_refuses_requests_to_change(server):
    for control in (OverHttp(server), OverGrpc(server)):
        for answer in (control.load("settled"), control.unload("settled")):
            assert answer.startswith("503 explicit model load / unload is not allowed if polling is enabled")
        control.close()


def test_strict_readiness_outlives_a_version_swap(tmp_path):
    onnx_model(tmp_path, "swapped")
    with RunningServer(tmp_path, "--strict-readiness") as server:
        assert server.get("/v2/health/ready")[0] == 200
        onnx_model(tmp_path, "swapped", version=2)
        server.wait_for(lambda: server.get("/v2/models/swapped/versions/2/ready")[0] == 200)
        server.wait_for(lambda: server.get("/v2/models/swapped/versions/1/ready")[0] == 400)
        assert server.wait_for(lambda: server.get("/v2/health/ready")[0] == 200)
