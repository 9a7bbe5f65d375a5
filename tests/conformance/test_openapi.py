"""Our own OpenAPI document and the Open Inference Protocol's, against a real server, by requests made up from them.

HEADRACE_TEST_EXAMPLES says how many requests are made up for an operation, beside those that its schema's bounds give.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import echo_repository
import pytest
import requests
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter
from running_server import RunningServer
from schemathesis import GenerationMode
from schemathesis.generation.drivers import CoverageGenerator
from schemathesis.generation.feedback import NO_FEEDBACK
from schemathesis.generation.overrides import Override
from schemathesis.specs.openapi import checks

EXAMPLES = int(os.environ.get("HEADRACE_TEST_EXAMPLES", "12"))
TIMEOUT_S = 60
EXAMPLE_KEY = f"headrace_example_{os.getpid()}"  # /dev/shm is everybody's who runs this
SAMPLES = Path(__file__).parents[2] / "model_repository"
PROTOCOL = yaml.safe_load((Path(__file__).parent / "oip/open_inference_rest.yaml").read_text())
PROTOCOL_ROUTES = [
    (method, path) for path, methods in PROTOCOL["paths"].items() for method in ("get", "post") if method in methods
]

# Models by their names, with what an inference needs: name, datatype and shape of each input.
MODELS = {
    "digits": [("image", "FP32", [-1, 64])],
    "echo": [("x", "FP32", [-1, 3])],
    "rows": [("numbers", "INT32", [-1, 2]), ("texts", "BYTES", [-1, 1])],
    "counts": [("count", "INT32", [1])],
    "pair": [("x", "FP32", [-1, 3])],
}
SPARE = "spare"  # the only one that is loaded and unloaded

ROWS = """
class Model:
    inputs = [
        {"name": "numbers", "datatype": "INT32", "shape": [-1, 2]},
        {"name": "texts", "datatype": "BYTES", "shape": [-1, 1]},
    ]
    outputs = [
        {"name": "numbers_out", "datatype": "INT32", "shape": [-1, 2]},
        {"name": "texts_out", "datatype": "BYTES", "shape": [-1, 1]},
    ]
    max_batch_size = 4

    def infer(self, inputs):
        return {"numbers_out": inputs["numbers"], "texts_out": inputs["texts"]}
"""

COUNTS = """
import numpy as np
from headrace_backends.base import InputError


class Model:
    inputs = [{"name": "count", "datatype": "INT32", "shape": [1]}]
    outputs = [{"name": "number", "datatype": "INT32", "shape": [1]}]

    def infer(self, inputs):
        count = int(inputs["count"][0])
        if count < 0:
            raise InputError(f"input 'count' is {count}, expected 0 or more")
        for number in range(count % 4):
            yield {"number": np.array([number], np.int32)}
"""

PAIR = """
ensemble:
- {model: echo, inputs: {x: x}, outputs: {y: between}}
- {model: echo, inputs: {x: between}, outputs: {y: y}}
"""

_MODEL = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
ROUTES = {
    ("GET", "/v2/health/live"),
    ("GET", "/v2/health/ready"),
    ("GET", "/v2"),
    ("GET", "/v2/models"),
    *(("GET", f"{model}{rest}") for model in _MODEL for rest in ("", "/ready", "/config", "/stats")),
    *(
        ("POST", f"{model}/{rest}")
        for model in _MODEL
        for rest in ("infer", "generate", "generate_stream", "infer_stream")
    ),
    ("GET", "/v2/models/stats"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/{name}/load"),
    ("POST", "/v2/repository/models/{name}/unload"),
    ("POST", "/v2/repository/models/{name}/plan"),
    ("POST", "/v2/repository/{repository_name}/index"),
    ("POST", "/v2/repository/{repository_name}/models/{name}/load"),
    ("POST", "/v2/repository/{repository_name}/models/{name}/unload"),
    *(
        (method, f"/v2/{kind}sharedmemory{rest}")
        for kind in ("system", "cuda")
        for method, rest in (
            ("GET", "/status"),
            ("GET", "/region/{name}/status"),
            ("POST", "/region/{name}/register"),
            ("POST", "/region/{name}/unregister"),
            ("POST", "/unregister"),
        )
    ),
    *((method, f"{prefix}/trace/setting") for prefix in ("/v2", "/v2/models/{name}") for method in ("GET", "POST")),
    *((method, f"{model}/recording") for model in _MODEL for method in ("GET", "POST", "DELETE")),
    *((method, "/v2/models/{name}/recording/file") for method in ("GET", "DELETE")),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
    ("GET", "/metrics"),
}
INFER_PATHS = [f"{model}/infer" for model in _MODEL]
FITTING = [f"{model}/{rest}" for model in _MODEL for rest in ("infer", "infer_stream", "generate", "generate_stream")]

MADE_UP = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

# -- the server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a model of each kind; in the end the same workers live, and no request went wrong in it."""
    flags = ["--model-control", "explicit", "--load-model", "*", "--allow-client-shm", "--max-request-bytes", "1000000"]
    with RunningServer(_repository(tmp_path_factory.mktemp("openapi")), *flags) as running:
        assert [name for name in MODELS if not running.model_ready(name)] == [], running.output
        before = _workers(running)
        yield running
        _quiet(running)
        assert running.get("/v2/health/ready")[0] == 200
        assert [name for name in MODELS if not running.model_ready(name)] == []
        assert _workers(running) == before, "a worker has died"
        assert "Traceback" not in running.output, running.output[running.output.index("Traceback") - 500 :][:3000]
        assert running.stop() == 0


def _repository(folder: Path) -> Path:
    shutil.copytree(SAMPLES / "digits", folder / "digits")
    for name in ("echo", SPARE):
        echo_repository.onnx_echo(folder, name, "FP32", ["rows", 3])
    for name, code in (("rows", ROWS), ("counts", COUNTS)):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1/model.py").write_text(code)
    (folder / "pair").mkdir()
    (folder / "pair/config.yaml").write_text(PAIR)
    return folder


def _quiet(running: RunningServer) -> None:
    """Logging and tracing as at the start."""
    running.post("/v2/logging", {"log_info": True, "log_warning": True, "log_error": True, "log_verbose_level": 0})
    running.post("/v2/trace/setting", {"trace_level": None, "trace_rate": None, "trace_count": None})


def _workers(running: RunningServer) -> set[int]:
    """The worker processes of all models but the spare one: one each, and none for an ensemble."""
    assert running.post(f"/v2/repository/models/{SPARE}/unload")[0] == 200
    alive = running.wait_for(lambda: len(found := running.workers()) == len(MODELS) - 1 and found)
    return {worker.pid for worker in alive}


# -- two ways to it ---------------------------------------------------------------------------------------------------


class OrdinaryRoute(HTTPAdapter):
    """Sends inference requests so that the fast lane leaves them to the application, which unescapes the letter."""

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        assert request.url is not None
        path, mark, query = request.url.partition("?")
        request.url = path.removesuffix("/infer") + "/%69nfer" * path.endswith("/infer") + mark + query
        return super().send(request, *args, **kwargs)


@pytest.fixture(scope="module")
def lane() -> Iterator[requests.Session]:
    """The way through the fast lane."""
    with requests.Session() as session:
        session.trust_env = False
        yield session


@pytest.fixture(scope="module")
def route() -> Iterator[requests.Session]:
    """The way around it."""
    with requests.Session() as session:
        session.trust_env = False
        session.mount("http://", OrdinaryRoute())
        yield session


# -- the documents ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document(target: RunningServer) -> dict[str, Any]:
    """Our own document."""
    return target.get("/openapi.json")[1]


@pytest.fixture(scope="module")
def ours(document: dict[str, Any]) -> Any:
    return schemathesis.openapi.from_dict(document)


@pytest.fixture(scope="module")
def protocol() -> Any:
    return schemathesis.openapi.from_dict(PROTOCOL)


def test_ours_is_openapi_and_refers_to_nothing_that_is_not_there(document: dict[str, Any], ours: Any):
    assert document["openapi"].startswith("3.1.")
    ours.validate()
    text = json.dumps(document)
    assert "$defs" not in text
    schemas = document["components"]["schemas"]
    for reference in _references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas, reference


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _references(one)


def test_the_protocols_document_is_openapi(protocol: Any):
    protocol.validate()
    assert all("$" not in path for path in protocol)


def test_every_path_is_there_and_says_what_it_takes_and_gives(document: dict[str, Any]):
    operations = {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert set(operations) == ROUTES
    tags = {tag["name"] for tag in document["tags"]}
    for (method, path), operation in operations.items():
        where = f"{method} {path}"
        assert set(operation["tags"]) <= tags, where
        assert operation["description"], where
        given_parameters = {one["name"]: one["in"] for one in operation.get("parameters", [])}
        for name in ("name", "version", "repository_name"):
            assert (given_parameters.get(name) == "path") == (f"{{{name}}}" in path), where
        assert "query" not in given_parameters.values(), where
        statuses = set(operation["responses"])
        assert "422" not in statuses, where
        assert ("404" in statuses) == ("{" in path), where
        assert "400" in statuses or "{version}" not in path, where
        assert ("403" in statuses) == (path != "/metrics"), where
        assert ("413" in statuses) == (method == "POST"), where
        for status, response in operation["responses"].items():
            if status >= "400":
                assert response["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}


def test_a_version_in_the_query_is_none(target: RunningServer):
    for path in ("", "/ready", "/config", "/stats"):
        assert target.get(f"/v2/models/echo{path}?version=9")[0] == 200
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}
    for path in ("infer", "%69nfer", "infer_stream"):
        assert target.post(f"/v2/models/echo/{path}?version=9", body)[0] == 200
    for path in ("generate", "generate_stream"):
        assert target.post(f"/v2/models/echo/{path}?version=9", {"x": [1, 2, 3]})[0] == 200
    assert target.get("/v2/trace/setting?name=nobody")[0] == 200


def test_the_docs_are_a_page(target: RunningServer):
    status, headers, page = target.request("GET", "/docs")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert b"/openapi.json" in page


def test_each_example_works_as_it_stands(tmp_path: Path):
    """On a server of its own: some of them load and unload what the others ask for."""
    flags = ["--model-control", "explicit", "--load-model", "digits", "--allow-client-shm"]
    flags += ["--trace-file", str(tmp_path / "trace.json")]
    flags += ["--allow-recording", "--plan-cache", str(tmp_path / "plans")]
    shared = Path("/dev/shm") / EXAMPLE_KEY
    shared.write_bytes(bytes(256))
    try:
        with RunningServer(_repository(tmp_path / "models"), *flags) as running:
            tried = [
                _try_example(running, method, path, operation, example)
                for path, methods in running.get("/openapi.json")[1]["paths"].items()
                for method, operation in methods.items()
                for example in _examples(operation)
            ]
            assert sum(tried) == len(tried) - 2, "all but CUDA's have an answer"
            assert len(tried) > 45
    finally:
        shared.unlink()


def _examples(operation: dict[str, Any]) -> list[Any]:
    """Bodies to send: one for each example, or none at all where there is nothing to send."""
    content = operation.get("requestBody", {}).get("content", {})
    return [one["value"] for one in content.get("application/json", {}).get("examples", {}).values()] or [None]


def _try_example(running: RunningServer, method: str, path: str, operation: dict[str, Any], example: Any) -> bool:
    """Whether there was an answer; where not, the document says so."""
    filled = path
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path":
            filled = filled.replace(f"{{{parameter['name']}}}", parameter["example"])
    if filled.endswith("/region/image/status") and "system" in filled:
        running.post("/v2/systemsharedmemory/region/image/register", {"key": EXAMPLE_KEY, "byte_size": 8})
    if filled.endswith("/recording/file") and method == "get":
        _record(running)
    if isinstance(example, dict) and "key" in example:
        example = example | {"key": example["key"].replace("headrace_example", EXAMPLE_KEY)}
    status, _, answer = running.request(
        method.upper(), filled, b"" if example is None and method == "post" else example
    )
    if filled.endswith("/region/image/status"):
        running.post("/v2/systemsharedmemory/unregister")
    if filled.endswith("/unload"):
        assert running.post("/v2/repository/models/digits/load")[0] == 200
    if "200" in operation["responses"] and status != 200:
        assert "cuda" in path, (filled, answer)
        assert status in (400, 404, 501)  # its handle is nobody's, if there is a driver
        return False
    assert str(status) in operation["responses"], (filled, answer)
    return True


def _record(running: RunningServer) -> None:
    assert running.post("/v2/models/digits/recording")[0] == 200
    body = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 64], "data": [0.0] * 64}]}
    assert running.post("/v2/models/digits/infer", body)[0] == 200
    assert running.request("DELETE", "/v2/models/digits/recording")[0] == 200


# -- requests that are made up ---------------------------------------------------------------------------------------


def no_failure(_: Any, response: Any, case: Any) -> None:
    """Nothing that is sent makes the server fail. A client that gives it no time is told so."""
    if response.status_code == 503 and "grpc-timeout" in (case.headers or {}):
        assert "Request timeout expired" in response.text or "Refused at arrival" in response.text
        return
    assert response.status_code < 500 or response.status_code == 501, response.text


def one_form_of_errors(_: Any, response: Any, __: Any) -> None:
    """An error is an object with a message, also as an event."""
    if response.status_code < 400:
        return
    text = response.text
    if response.headers["content-type"][0].startswith("text/event-stream"):
        assert text.startswith("data: ")
        assert text.endswith("\n\n")
        text = text.removeprefix("data: ")
    else:
        assert response.headers["content-type"] == ["application/json"]
    found = json.loads(text)
    assert list(found) == ["error"]
    assert isinstance(found["error"], str)
    assert found["error"]


def events_of_responses(_: Any, response: Any, __: Any) -> None:
    """A stream is made of events with one JSON object each: a response or, in the end, an error."""
    if response.status_code != 200 or not response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        return
    *events, rest = response.text.split("\n\n")
    assert not rest
    for event in events:
        found = json.loads(event.removeprefix("data: "))
        assert "model_name" in found or list(found) == ["error"]


def violations_are_refused(context: Any, response: Any, case: Any) -> bool | None:
    """A body that is none is refused, unless a header says that it is not JSON at all but an input's bytes."""
    if case.headers.get("Inference-Header-Content-Length") == "0":
        return None
    return checks.negative_data_rejection(context, response, case)


CHECKS: list[Any] = [
    no_failure,
    one_form_of_errors,
    events_of_responses,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    violations_are_refused,
    checks.unsupported_method,
    checks.allow_header_conformance,
]


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES))
def test_our_document_through_the_lane(
    target: RunningServer, ours: Any, lane: requests.Session, method: str, path: str
):
    _try_operation(ours[path][method], target, lane)


@pytest.mark.parametrize("path", INFER_PATHS)
def test_our_document_around_the_lane(target: RunningServer, ours: Any, route: requests.Session, path: str):
    _try_operation(ours[path]["POST"], target, route)


@pytest.mark.parametrize(("method", "path"), PROTOCOL_ROUTES)
def test_the_protocols_document_through_the_lane(
    target: RunningServer, protocol: Any, lane: requests.Session, method: str, path: str
):
    _try_operation(protocol[path][method], target, lane)


@pytest.mark.parametrize("path", [path for method, path in PROTOCOL_ROUTES if method == "post"])
def test_the_protocols_document_around_the_lane(
    target: RunningServer, protocol: Any, route: requests.Session, path: str
):
    _try_operation(protocol[path]["POST"], target, route)


def _try_operation(operation: Any, target: RunningServer, session: requests.Session) -> None:
    """Send what the bounds of the operation's schema give, and what is drawn from it and from what it is not."""
    for case in CoverageGenerator(
        operation=operation,
        generation_modes=list(GenerationMode),
        generation_config=operation.schema.config.generation_for(operation=operation, phase="coverage"),
        auth_storage=None,
        override=Override(),
        feedback=NO_FEEDBACK,
    ):
        _ask_twice(case, target, session)

    @MADE_UP
    @given(case=st.one_of([operation.as_strategy(mode, feedback=NO_FEEDBACK) for mode in GenerationMode]))
    def ask(case: Any) -> None:
        _ask_twice(case, target, session)

    ask()


def _ask_twice(case: Any, target: RunningServer, session: requests.Session) -> None:
    """As it was made up, and with the names of what is there, so that more is looked at than the name."""
    aimed = _aimed(case)
    if "/repository/" not in case.path or case.path_parameters.get("name") not in MODELS:
        _ask(case, target, session)
    if aimed is not None:
        _ask(aimed, target, session)


def _ask(case: Any, target: RunningServer, session: requests.Session) -> Any:
    return case.call_and_validate(f"http://{target.http}", session, checks=CHECKS, timeout=TIMEOUT_S)


def _aimed(case: Any) -> Any:
    """The same with real names, or None where there are no names in it."""
    if not case.path_parameters or "repository_name" in case.path_parameters:
        return None
    aimed = case.derive()
    number = crc32(repr((case.body, case.path_parameters)).encode())
    chosen = sorted(MODELS)[number % len(MODELS)]
    for name in case.path_parameters:
        if name.lower().endswith("version"):
            if number % 3:  # else as it was made up
                aimed.path_parameters[name] = "1"
        elif "/repository/" in case.path:
            aimed.path_parameters[name] = SPARE
        else:
            aimed.path_parameters[name] = "image" if "/region/" in case.path else chosen
    return aimed


# -- requests that nearly fit ----------------------------------------------------------------------------------------

NUMBERS = {
    "FP32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "INT32": st.integers(-(2**31), 2**31 - 1),
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
PARAMETERS = st.dictionaries(
    st.sampled_from(["binary_data_output", "priority", "sequence_id", "sequence_start", "headers"])
    | st.text(max_size=6),
    st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    max_size=3,
)
OUTPUT_PARAMETERS = st.dictionaries(
    st.sampled_from(["binary_data", "classification", "shared_memory_region", "shared_memory_byte_size"]),
    st.booleans() | st.integers(-2, 300) | st.text(max_size=4),
    max_size=2,
)
OUTPUTS = ["probabilities", "y", "numbers_out", "texts_out", "number", "nothing"]


@st.composite
def tensors(draw: Any, model: str) -> list[dict[str, Any]]:
    """The inputs of a model, of one number of rows, with at most one thing wrong in each."""
    rows = draw(st.integers(0, 5))
    inputs = []
    for name, datatype, declared in MODELS[model]:
        shape: list[Any] = [rows if size == -1 else size for size in declared]
        count = shape[0] * (shape[1] if shape[1:] else 1)
        few = draw(st.lists(NUMBERS.get(datatype, st.text(max_size=5)), min_size=1, max_size=3))
        one = {"name": name, "datatype": datatype, "shape": shape, "data": [few[n % len(few)] for n in range(count)]}
        broken = draw(st.sampled_from([None, None, None, *one, "parameters", "element"]))
        if broken == "element":
            one["data"] = [*one["data"][:-1], draw(ANYTHING)]
        elif broken is not None:
            one[broken] = draw(ANYTHING)
        inputs.append(one)
    return inputs


def fitting_body(model: str) -> dict[str, Any]:
    """One row of whatever the model takes."""
    inputs = []
    for name, datatype, declared in MODELS[model]:
        shape = [1 if size == -1 else size for size in declared]
        count = shape[0] * (shape[1] if shape[1:] else 1)
        inputs.append(
            {"name": name, "datatype": datatype, "shape": shape, "data": [1 if datatype in NUMBERS else "a"] * count}
        )
    return {"inputs": inputs}


@st.composite
def infer_bodies(draw: Any, model: str) -> dict[str, Any]:
    body: dict[str, Any] = {"inputs": draw(tensors(model))}
    if draw(st.booleans()):
        body["id"] = draw(st.text(max_size=10))
    if draw(st.booleans()):
        body["parameters"] = draw(PARAMETERS)
    if draw(st.booleans()):
        asked = st.fixed_dictionaries({"name": st.sampled_from(OUTPUTS)}, optional={"parameters": OUTPUT_PARAMETERS})
        body["outputs"] = draw(st.lists(asked, max_size=2))
    return body


@st.composite
def generate_bodies(draw: Any, model: str) -> dict[str, Any]:
    body = {one["name"]: one["data"] for one in draw(tensors(model)) if isinstance(one["name"], str)}
    return body | draw(st.dictionaries(st.text(max_size=6), ANYTHING, max_size=2))


@pytest.mark.parametrize("path", FITTING)
@pytest.mark.parametrize("way", ["lane", "route"])
def test_requests_that_nearly_fit(
    target: RunningServer, ours: Any, request: pytest.FixtureRequest, path: str, way: str
):
    session = request.getfixturevalue(way)
    operation = ours[path]["POST"]
    bodies = generate_bodies if "/generate" in path else infer_bodies
    answered = set()

    @MADE_UP
    @given(data=st.data())
    def ask(data: Any) -> None:
        model = data.draw(st.sampled_from(sorted(MODELS)))
        case = operation.Case(
            path_parameters={"name": model, "version": "1"},
            body=data.draw(bodies(model)),
            media_type="application/json",
        )
        _ask(case, target, session)

    # What is made up may by chance be all right or all wrong, so one of each comes first.
    for model in MODELS:
        fitting = fitting_body(model)
        if "/generate" in path:
            fitting = {one["name"]: one["data"] for one in fitting["inputs"]}
        for body in (fitting, {}):
            case = operation.Case(
                path_parameters={"name": model, "version": "1"}, body=body, media_type="application/json"
            )
            answered.add(_ask(case, target, session).status_code)
    assert 200 in answered
    assert answered & {400, 501}
    ask()
