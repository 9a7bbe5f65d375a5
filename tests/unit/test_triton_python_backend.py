"""Models written for Triton's Python backend: how they load, are given requests, and answer them."""

import json
import sys
import textwrap
import threading

import numpy as np
import pytest

from headrace.core.errors import (
    Cancelled,
    InternalError,
    InvalidRequest,
    NotFound,
    NotReady,
    Unsupported,
)
from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import Answer, LoadError, ModelSource, RequestInfo
from headrace_backends.python import PythonBackend
from headrace_backends.triton_python.chores import Chores

WAIT_S = 60
NAME = "triton_python_backend_utils"
X = TensorSpec("x", DataType.FP32, (-1, 2))
Y = TensorSpec("y", DataType.FP32, (-1, 2))
HEAD = """
import json, threading
import numpy as np
import triton_python_backend_utils as pb_utils

def respond(array, **more):
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", array)], **more)

def x_of(request):
    return pb_utils.get_input_tensor_by_name(request, "x").as_numpy()

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
"""


@pytest.fixture
def load(tmp_path):
    """Loads a model.py, and closes it after the test."""
    backends = []

    def loaded(code, helper=None, **source):
        folder = tmp_path / f"m{len(backends)}" / "1"
        folder.mkdir(parents=True)
        (folder / "model.py").write_text(HEAD + textwrap.dedent(code))
        if helper is not None:
            (folder / "helper.py").write_text(helper)
        keywords = {"inputs": (X,), "outputs": (Y,), "max_batch_size": 8, **source}
        backends.append(PythonBackend.load(ModelSource("m", "1", folder, **keywords)))
        return backends[-1]

    yield loaded
    for backend in backends:
        backend.close()
    assert NAME not in sys.modules


def rows(*values):
    return np.array([[value, value] for value in values], np.float32).reshape(-1, 2)


def run(backend, x, *requests):
    return backend.execute({"x": x}, requests or [RequestInfo(len(x), "", {})])


class Stream:
    """What a worker gives ``begin``: remembers what was sent."""

    def __init__(self, **said):
        self.request = RequestInfo(**{"rows": 1, "id": "", "parameters": {}, **said})
        self.cancelled = False
        self.answers = []
        self.ended = threading.Event()

    def send(self, answer):
        assert not self.ended.is_set()
        self.answers.append(answer)

    def end(self, error=None):
        assert not self.ended.is_set()
        if error is not None:
            self.answers.append(Answer(error=error))
        self.ended.set()

    @property
    def values(self):
        """The first value of each response, when the last has come."""
        assert self.ended.wait(WAIT_S)
        return [
            float(answer.outputs["y"].flat[0]) if answer.error is None else str(answer.error) for answer in self.answers
        ]


def begin(backend, *values, stream=None):
    stream = stream or Stream()
    assert backend.begin({"x": rows(*values)}, stream) is None
    return stream


LIFE = """
import helper

class TritonPythonModel:
    def initialize(self, args):
        self.args = args
        self.factor = helper.factor()

    def execute(self, requests):
        import late
        return [respond(x_of(request) * self.factor * late.ONE) for request in requests]

    def finalize(self):
        from pathlib import Path
        Path(pb_utils.get_model_dir(), "gone").write_text(self.args["model_name"])
"""
HELPER = """
import numpy as np
def factor():
    import triton_python_backend_utils
    return np.ones(1, triton_python_backend_utils.triton_string_to_numpy("TYPE_FP32"))[0] * 3
"""


def test_life_of_a_model(tmp_path):
    modules, path, bytecode = set(sys.modules), list(sys.path), sys.dont_write_bytecode
    folder = tmp_path / "m" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(HEAD + LIFE)
    (folder / "helper.py").write_text(HELPER)
    (folder / "late.py").write_text("ONE = 1")
    source = ModelSource(
        "m",
        "1",
        folder,
        "gpu:2",
        inputs=(X,),
        outputs=(Y,),
        max_batch_size=4,
        parameters={"k": 5},
        repository="/repo/m",
    )
    backend = PythonBackend.load(source)
    assert backend.signature.inputs == (X,)
    assert backend.signature.outputs == (Y,)
    assert backend.signature.max_batch_size == 4
    assert backend.wants_requests
    args = backend._model.args
    config = json.loads(args.pop("model_config"))
    assert args == {
        "model_instance_kind": "GPU",
        "model_instance_device_id": "2",
        "model_instance_name": "m_0",
        "model_repository": "/repo/m",
        "model_version": "1",
        "model_name": "m",
    }
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [2]}]
    assert config["max_batch_size"] == 4
    assert config["parameters"] == {"k": {"string_value": "5"}}
    (answer,) = run(backend, rows(2))
    assert answer.outputs["y"].tolist() == rows(6).tolist()
    backend.close()
    assert (folder / "gone").read_text() == "m"
    assert not (folder / "__pycache__").exists()
    assert set(sys.modules) == modules
    assert sys.path == path
    assert sys.dont_write_bytecode == bytecode


def test_configuration_is_passed_on(load):
    code = """
    class TritonPythonModel:
        def initialize(self, args):
            self.config = json.loads(args["model_config"])
        def execute(self, requests): pass
    """
    given = {
        "name": "m",
        "max_batch_size": 0,
        "input": [{"name": "a", "data_type": "TYPE_STRING", "dims": [-1], "optional": True}],
        "output": [{"name": "b", "data_type": "TYPE_INT8", "dims": [3]}],
        "instance_group": [{"kind": "KIND_CPU"}],
    }
    backend = load(code, config_json=json.dumps(given))
    assert given.items() <= backend._model.config.items()
    assert backend.signature.inputs == (TensorSpec("a", DataType.BYTES, (-1,), optional=True),)
    assert backend.signature.outputs == (TensorSpec("b", DataType.INT8, (3,)),)


def test_each_request_gets_its_rows(load):
    code = """
    class TritonPythonModel:
        def execute(self, requests):
            self.seen = [(r.request_id(), r.inputs()[0].shape(), r.requested_output_names()) for r in requests]
            return [respond(x_of(request) + i, parameters={"i": i}) for i, request in enumerate(requests)]
    """
    backend = load(code)
    first, second = run(backend, rows(1, 2, 3), RequestInfo(2, "a", {}), RequestInfo(1, "b", {}, ("y",)))
    assert backend._model.seen == [("a", [2, 2], ["y"]), ("b", [1, 2], ["y"])]
    np.testing.assert_array_equal(first.outputs["y"], rows(1, 2))
    np.testing.assert_array_equal(second.outputs["y"], rows(4))
    assert (first.parameters, second.parameters) == ({"i": 0}, {"i": 1})


def test_inputs_are_the_models_to_keep(load):
    code = """
    class TritonPythonModel:
        def execute(self, requests):
            self.kept = [*getattr(self, "kept", []), *(x_of(request) for request in requests)]
            return [respond(x_of(request)) for request in requests]
    """
    backend = load(code)
    memory = rows(1, 2)
    run(backend, memory, RequestInfo(1, "", {}), RequestInfo(1, "", {}))
    memory[:] = rows(3, 4)  # as the next batch does
    run(backend, memory)
    memory[:] = 0
    assert [kept[:, 0].tolist() for kept in backend._model.kept] == [[1], [2], [3, 4]]


def test_what_a_request_says(load):
    code = """
    class TritonPythonModel:
        def execute(self, requests):
            (r,) = requests
            r.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_ALL)
            self.said = [r.correlation_id(), r.flags(), r.timeout(), r.priority(), json.loads(r.parameters()),
                         r.model_name(), r.model_version(), r.is_cancelled(), r.trace().get_context()]
            return [respond(x_of(r))]
    """
    backend = load(code)
    parameters = {
        "sequence_id": 7,
        "sequence_start": True,
        "sequence_end": False,
        "timeout": 5,
        "priority": 1,
        "k": "v",
    }
    run(backend, rows(1), RequestInfo(1, "", parameters))
    assert backend._model.said == [7, 1, 5, 1, {"k": "v"}, "m", 1, False, None]
    run(
        backend,
        rows(1),
        RequestInfo(1, "", {"sequence_id": "s", "sequence_end": True, "triton_enable_empty_final_response": True}),
    )
    assert backend._model.said[:5] == ["s", 2, 0, 0, {}]


def test_one_request_of_a_model_that_does_not_batch(load):
    backend = load(
        "class TritonPythonModel:\n    def execute(self, requests): return [respond(x_of(requests[0])[:1])]",
        max_batch_size=0,
    )
    (answer,) = run(backend, rows(1, 2, 3))
    assert answer.outputs["y"].shape == (1, 2)


def giving(load, expression, **source):
    return load(f"class TritonPythonModel:\n    def execute(self, requests):\n        return {expression}", **source)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("", InternalError),
        (", pb_utils.TritonError.UNKNOWN", InternalError),
        (", pb_utils.TritonError.INTERNAL", InternalError),
        (", pb_utils.TritonError.NOT_FOUND", NotFound),
        (", pb_utils.TritonError.INVALID_ARG", InvalidRequest),
        (", pb_utils.TritonError.UNAVAILABLE", NotReady),
        (", pb_utils.TritonError.UNSUPPORTED", Unsupported),
        (", pb_utils.TritonError.ALREADY_EXISTS", InvalidRequest),
        (", pb_utils.TritonError.CANCELLED", Cancelled),
    ],
)
def test_an_error_of_one_request(load, code, kind):
    backend = giving(
        load, f"[pb_utils.InferenceResponse(error=pb_utils.TritonError('no'{code})), respond(x_of(requests[1]))]"
    )
    bad, good = run(backend, rows(1, 2), RequestInfo(1, "", {}), RequestInfo(1, "", {}))
    assert type(bad.error) is kind
    assert str(bad.error) == "no"
    np.testing.assert_array_equal(good.outputs["y"], rows(2))


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("3", "execute gave int, expected a list of pb_utils.InferenceResponse"),
        ("[]", "execute gave 0 responses for 1 requests"),
    ],
)
def test_what_execute_must_return(load, expression, problem):
    with pytest.raises((TypeError, RuntimeError), match=problem):
        run(giving(load, expression), rows(1))


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("None", "no response to the request, and did not take its response sender"),
        ("[None]", "no response to the request"),
        ("[3]", "a int, expected a pb_utils.InferenceResponse"),
        ("[respond(np.ones((1, 2)))]", "output 'y' is an array of float64, expected FP32"),
        ("[respond(np.ones((2, 2), np.float32))]", "output 'y' has shape [2, 2], expected 1 rows"),
        ("[respond(np.array(1, np.float32))]", "output 'y' has shape [], expected 1 rows"),
        (
            "[pb_utils.InferenceResponse([pb_utils.Tensor('Y', x_of(requests[0]))])]",
            "has the outputs ['Y'], expected ['y']",
        ),
    ],
)
def test_wrong_responses_are_the_requests_error(load, expression, problem):
    (answer,) = run(giving(load, expression), rows(1))
    assert isinstance(answer.error, InternalError)
    assert problem in str(answer.error)


def test_outputs_that_were_asked_for(load):
    outputs = (Y, TensorSpec("z", DataType.FP32, (-1, 2)))
    backend = giving(load, "[respond(x_of(request)) for request in requests]", outputs=outputs)
    infos = [RequestInfo(1, "", {}, names) for names in (("y",), ("z",), ())]
    only_y, only_z, everything = run(backend, rows(1, 2, 3), *infos)
    assert list(only_y.outputs) == ["y"]
    assert "has the outputs ['y'], expected ['z']" in str(only_z.error)
    assert list(everything.outputs) == ["y"]  # as in Triton, where a model may leave out what nobody named


def test_outputs_that_were_not_asked_for_are_left_out(load):
    outputs = (Y, TensorSpec("z", DataType.FP32, (-1, 2)))
    code = "[pb_utils.InferenceResponse([pb_utils.Tensor(n, x_of(requests[0])) for n in ('z', 'y', 'extra')])]"
    (answer,) = run(giving(load, code, outputs=outputs), rows(1), RequestInfo(1, "", {}, ("y",)))
    assert list(answer.outputs) == ["y"]


@pytest.mark.parametrize("value", ["[b'a', 'é']", "['a', 'é']"])
def test_text(load, value):
    outputs = (TensorSpec("y", DataType.BYTES, (-1, 2)),)
    (answer,) = run(giving(load, f"[respond(np.array([{value}], object))]", outputs=outputs), rows(1))
    assert answer.outputs["y"].tolist() == [[b"a", "é".encode()]]


@pytest.mark.parametrize(("value", "fits"), [(127, True), (-128, True), (128, False), (-129, False)])
def test_whole_numbers_that_fit_are_converted(load, value, fits):
    outputs = (TensorSpec("y", DataType.INT8, (-1, 2)),)
    (answer,) = run(giving(load, f"[respond(np.array([[{value}, 0]]))]", outputs=outputs), rows(1))
    if fits:
        assert answer.outputs["y"].dtype == np.int8
        assert answer.outputs["y"].tolist() == [[value, 0]]
    else:
        assert "output 'y' is an array of int64, expected INT8" in str(answer.error)


def test_exceptions_fail_the_batch(load):
    with pytest.raises(Exception, match=r"^sorry$") as caught:
        run(
            load("class TritonPythonModel:\n    def execute(self, r): raise pb_utils.TritonModelException('sorry')"),
            rows(1),
        )
    assert type(caught.value).__name__ == "TritonModelException"
    assert caught.value.message() == "sorry"


def test_rescheduling_is_refused(load):
    code = """
    class TritonPythonModel:
        def execute(self, requests):
            requests[0].set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
    """
    with pytest.raises(Exception, match="rescheduling a request is not offered"):
        run(load(code), rows(1))


def test_senders_of_a_model_that_is_not_decoupled(load):
    code = """
    class TritonPythonModel:
        def execute(self, requests):
            for request in requests:
                sender, x = request.get_response_sender(), x_of(request)
                threading.Timer(0.01, self.answer, (sender, x)).start()

        def answer(self, sender, x):
            sender.send(respond(x * 2))
            sender.send(flags=FINAL)
    """
    first, second = run(load(code), rows(1, 2), RequestInfo(1, "", {}), RequestInfo(1, "", {}))
    np.testing.assert_array_equal(first.outputs["y"], rows(2))
    np.testing.assert_array_equal(second.outputs["y"], rows(4))


def test_some_requests_are_answered_by_senders(load):
    code = """
    class TritonPythonModel:
        def execute(self, requests):
            requests[1].get_response_sender().send(respond(x_of(requests[1])), FINAL)
            return [respond(x_of(requests[0])), None]
    """
    first, second = run(load(code), rows(1, 2), RequestInfo(1, "", {}), RequestInfo(1, "", {}))
    np.testing.assert_array_equal(first.outputs["y"], rows(1))
    np.testing.assert_array_equal(second.outputs["y"], rows(2))


@pytest.mark.parametrize(
    ("sends", "problem"),
    [
        ("sender.send(ok); sender.send(ok)", "one response a request, not two"),
        ("sender.send(flags=FINAL)", "a response comes before the final flag"),
        ("sender.send(ok, FINAL); sender.send(flags=FINAL)", "the response sender is closed"),
        ("sender.send()", "neither a response nor the final flag"),
        ("sender.send(ok, 4)", "flags is 4, expected 0 or 1"),
        ("sender.send(3)", "response is int, expected pb_utils.InferenceResponse"),
    ],
)
def test_senders_that_are_misused(load, sends, problem):
    code = f"""
    class TritonPythonModel:
        def execute(self, requests):
            sender, ok = requests[0].get_response_sender(), respond(x_of(requests[0]))
            {sends}
    """
    with pytest.raises(Exception, match=problem):
        run(load(code), rows(1))


def test_an_answer_by_both_ways(load):
    code = """
    class TritonPythonModel:
        def execute(self, requests):
            requests[0].get_response_sender().send(respond(x_of(requests[0])))
            return [respond(x_of(requests[0]))]
    """
    (answer,) = run(load(code), rows(1))
    assert "that its response sender had answered" in str(answer.error)


def test_a_sender_that_nobody_took_has_not_answered(load, monkeypatch):
    # However soon the thread that sees to senders without an owner comes to it.
    monkeypatch.setattr(Chores, "add", lambda _, chore: chore())
    backend = load("""
        class TritonPythonModel:
            def execute(self, requests):
                return [respond(x_of(request)) for request in requests]
    """)
    (answer,) = run(backend, rows(1))
    assert answer.error is None
    assert answer.outputs["y"].tolist() == [[1, 1]]


def test_a_sender_that_the_model_lets_go_of(load):
    code = "class TritonPythonModel:\n    def execute(self, requests): requests[0].get_response_sender()"
    (answer,) = run(load(code), rows(1))
    assert "let go of the request's response sender without a final response" in str(answer.error)


def test_async_execute(load):
    code = """
    import asyncio
    class TritonPythonModel:
        async def execute(self, requests):
            self.loops = getattr(self, "loops", set()) | {id(asyncio.get_running_loop())}
            doubled = await asyncio.gather(*(self.double(x_of(request)) for request in requests))
            return [respond(x) for x in doubled]

        async def double(self, x):
            await asyncio.sleep(0)
            return x * 2
    """
    backend = load(code)
    for _ in range(2):
        first, second = run(backend, rows(1, 2), RequestInfo(1, "", {}), RequestInfo(1, "", {}))
        np.testing.assert_array_equal(first.outputs["y"], rows(2))
        np.testing.assert_array_equal(second.outputs["y"], rows(4))
    assert len(backend._model.loops) == 1


def test_async_execute_that_fails(load):
    with pytest.raises(ZeroDivisionError):
        run(load("class TritonPythonModel:\n    async def execute(self, requests): 1 / 0"), rows(1))


def test_async_execute_that_wants_to_exit(load):
    code = """
    import sys
    class TritonPythonModel:
        async def execute(self, requests):
            if (x_of(requests[0]) < 0).any():
                sys.exit("no")
            return [respond(x_of(request)) for request in requests]
    """
    backend = load(code)
    with pytest.raises(SystemExit, match="no"):
        run(backend, rows(-1))
    (answer,) = run(backend, rows(1))
    np.testing.assert_array_equal(answer.outputs["y"], rows(1))


THREADED = """
class TritonPythonModel:
    def execute(self, requests):
        (request,) = requests
        thread = threading.Thread(target=self.answer, args=(request.get_response_sender(), x_of(request)))
        thread.start()
        self.threads = [*getattr(self, "threads", []), thread]

    def answer(self, sender, x):
        for value in x[:, 0]:
            sender.send(respond(np.full((1, 2), value, np.float32)))
        sender.send(flags=FINAL)

    def finalize(self):
        for thread in self.threads:
            thread.join()
"""


def test_decoupled_from_threads(load):
    backend = load(THREADED, decoupled=True)
    assert backend.signature.decoupled
    streams = [begin(backend, *range(n)) for n in (3, 0, 1)]
    assert [stream.values for stream in streams] == [[0.0, 1.0, 2.0], [], [0.0]]


@pytest.mark.parametrize(
    ("body", "values"),
    [
        ("s.send(ok); s.send(ok, flags=FINAL)", [1.0, 1.0]),
        ("s.send(flags=FINAL)", []),
        ("s.send(pb_utils.InferenceResponse(error=pb_utils.TritonError('no'))); s.send(ok, FINAL)", ["no", 1.0]),
        ("s.send(respond(np.ones(1)), FINAL)", ["output 'y' is an array of float64, expected FP32"]),
        ("s.send(respond(np.ones((5, 2), np.float32)), FINAL)", [1.0]),
        ("del s, requests, r", ["the model let go of the request's response sender without a final response"]),
        ("s.send(ok)", [1.0, "the model let go of the request's response sender without a final response"]),
        ("pass", ["the model let go of the request's response sender without a final response"]),
    ],
)
@pytest.mark.parametrize("word", ["def", "async def"])
def test_decoupled_at_once(load, word, body, values):
    code = f"""
    class TritonPythonModel:
        {word} execute(self, requests):
            (r,) = requests
            s, ok = r.get_response_sender(), respond(x_of(r))
            {body}
    """
    assert begin(load(code, decoupled=True), 1).values == values


def test_nothing_can_be_sent_after_the_final_flag(load):
    code = """
    class TritonPythonModel:
        def execute(self, requests):
            self.sender = requests[0].get_response_sender()
            self.sender.send(flags=FINAL)
    """
    backend = load(code, decoupled=True)
    assert begin(backend, 1).values == []
    with pytest.raises(Exception, match="the response sender is closed"):
        backend._model.sender.send(flags=1)


def test_a_last_response_that_cannot_be_sent_ends_the_responses_all_the_same(load):
    class Refusing(Stream):
        def send(self, answer):
            raise TypeError("an output is not as declared")

    code = """
    class TritonPythonModel:
        def execute(self, requests):
            (r,) = requests
            self.sender, self.errors = r.get_response_sender(), []
            for flags in (0, FINAL):
                try:
                    self.sender.send(respond(x_of(r)), flags)
                except TypeError as error:
                    self.errors.append(str(error))
    """
    backend = load(code, decoupled=True)
    assert begin(backend, 1, stream=Refusing()).values == []
    assert backend._model.errors == ["an output is not as declared"] * 2
    with pytest.raises(Exception, match="the response sender is closed"):
        backend._model.sender.send(flags=1)


def test_decoupled_returns_none(load):
    with pytest.raises(TypeError, match="execute gave list, expected None: the model is decoupled"):
        begin(giving(load, "[respond(x_of(requests[0]))]", decoupled=True), 1)


def test_decoupled_failures(load):
    code = """
    class TritonPythonModel:
        def execute(self, requests):
            self.sender = requests[0].get_response_sender()
            self.sender.send(respond(x_of(requests[0])))
            raise ValueError("broken")
    """
    backend, stream = load(code, decoupled=True), Stream()
    with pytest.raises(ValueError, match="broken"):
        begin(backend, 1, stream=stream)
    assert len(stream.answers) == 1
    assert not stream.ended.is_set()  # the worker's part
    with pytest.raises(Exception, match="execute failed"):
        backend._model.sender.send(flags=1)


def test_a_failure_after_the_last_response_is_only_logged(load, caplog):
    code = """
    class TritonPythonModel:
        def execute(self, requests):
            requests[0].get_response_sender().send(flags=FINAL)
            raise ValueError("broken")
    """
    assert begin(load(code, decoupled=True), 1).values == []
    assert "model m: execute failed after its last response" in caplog.text


@pytest.mark.parametrize(
    ("end", "said"), [("raise ValueError('broken')", "broken"), ("return [1]", "execute gave list")]
)
def test_async_decoupled_failures(load, end, said, caplog):
    code = f"""
    class TritonPythonModel:
        async def execute(self, requests):
            self.sender = requests[0].get_response_sender()
            self.sender.send(respond(x_of(requests[0])))
            {end}
    """
    value, error = begin(load(code, decoupled=True), 1).values
    assert value == 1
    assert said in error
    assert "execute failed" in caplog.text


def test_async_decoupled_requests_run_together(load):
    code = """
    import asyncio
    class TritonPythonModel:
        async def execute(self, requests):
            (request,) = requests
            self.event = getattr(self, "event", None) or asyncio.Event()
            if x_of(request)[0, 0]:
                self.event.set()
            await self.event.wait()
            request.get_response_sender().send(respond(x_of(request)), FINAL)
    """
    backend = load(code, decoupled=True)
    first = begin(backend, 0)
    assert begin(backend, 1).values == [1.0]
    assert first.values == [0.0]


def test_cancelled(load):
    code = """
    class TritonPythonModel:
        def execute(self, requests):
            (r,) = requests
            sender = r.get_response_sender()
            sender.send(respond(np.full((1, 2), sender.is_cancelled() + 2 * r.is_cancelled(), np.float32)), FINAL)
    """
    backend, stream = load(code, decoupled=True), Stream()
    stream.cancelled = True
    assert begin(backend, 1, stream=stream).values == [3.0]


def test_two_models_in_one_process_have_their_own_modules(load):
    code = """
    class TritonPythonModel:
        def execute(self, requests):
            import triton_python_backend_utils
            assert triton_python_backend_utils is pb_utils
            return [respond(x_of(requests[0]))]
    """
    for backend in (first := load(code), load(code), first):
        (answer,) = run(backend, rows(1))
        assert answer == Answer(answer.outputs)


COMPLETES = """
class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        known = {{tensor["name"] for tensor in config.as_dict()["input"]}}
        if "x" not in known:
            config.add_input({{"name": "x", "data_type": "TYPE_FP32", "dims": [2], "optional": True}})
        config.add_output({{"name": "y", "data_type": "TYPE_FP32", "dims": [2]}})
        {more}
        return {result}

    def initialize(self, args):
        self.config = json.loads(args["model_config"])

    def execute(self, requests):
        return [respond(x_of(request)) for request in requests]
"""


def test_auto_complete(load):
    more = "config.set_max_batch_size(4); config.set_dynamic_batching()"
    nothing = {"inputs": (), "outputs": (), "max_batch_size": None}
    backend = load(COMPLETES.format(more=more, result="config"), **nothing)
    assert backend.signature.inputs == (TensorSpec("x", DataType.FP32, (-1, 2), optional=True),)
    assert backend.signature.outputs == (Y,)
    assert backend.signature.max_batch_size == 4
    assert backend._model.config["dynamic_batching"] == {}
    assert not backend.signature.decoupled
    more = "config.set_model_transaction_policy({'decoupled': True})"
    backend = load(COMPLETES.format(more=more, result="config"), **nothing)
    assert backend.signature.outputs == (TensorSpec("y", DataType.FP32, (2,)),)
    assert backend.signature.max_batch_size == 0
    assert backend.signature.decoupled


def test_auto_complete_keeps_what_is_declared(load):
    backend = load(COMPLETES.format(more="", result="config"), outputs=())
    assert backend.signature.inputs == (X,)
    assert backend.signature.outputs == (Y,)
    assert backend.signature.max_batch_size == 8


@pytest.mark.parametrize(
    ("code", "source", "problem"),
    [
        (
            COMPLETES.format(more="config.set_max_batch_size(4)", result="config"),
            {},
            "max_batch_size is 8 in the configuration",
        ),
        (COMPLETES.format(more="", result="None"), {}, "auto_complete_config gave NoneType, expected the ModelConfig"),
        (COMPLETES.format(more="config.add_output({})", result="config"), {}, r"an output has the keys \[\], expected"),
        (
            COMPLETES.format(more="", result="config"),
            {"outputs": (TensorSpec("y", DataType.FP32, (-1, 3)),)},
            r"output 'y' has dims \[3\] in the configuration, and \[2\] here",
        ),
        (
            "class TritonPythonModel:\n    def execute(self, r): pass",
            {"inputs": (), "outputs": ()},
            "its inputs are not declared: .*its outputs are not declared: .* or add them in TritonPythonModel.auto_",
        ),
        (
            "class TritonPythonModel:\n    def execute(self, r): pass",
            {
                "config_json": json.dumps(
                    {"input": [{"name": "a", "data_type": "FP32", "dims": ["2"]}], "output": [{"name": ""}]}
                )
            },
            r"'a' has the data_type 'FP32'.*'a' has the dims \['2'\].*an output has the name ''",
        ),
        ("class TritonPythonModel:\n    execute = 3", {}, r"no class TritonPythonModel with a method execute"),
        (
            "class TritonPythonModel:\n    execute = id\n    def initialize(self, args): raise KeyError('w')",
            {},
            r"fails in TritonPythonModel.initialize: KeyError: 'w' \(model.py, line \d+\)",
        ),
        (
            "class TritonPythonModel:\n    def execute(self, r): pass\n    def __init__(self): 1 / 0",
            {},
            r"cannot make its TritonPythonModel: ZeroDivisionError",
        ),
    ],
)
def test_what_cannot_load_says_why(load, code, source, problem):
    modules, path = set(sys.modules), list(sys.path)
    with pytest.raises(LoadError, match=problem):
        load(code, **source)
    assert set(sys.modules) == modules
    assert sys.path == path


def test_models_log(load, caplog):
    caplog.set_level("DEBUG")
    code = """
    class TritonPythonModel:
        def execute(self, requests):
            logger = pb_utils.Logger
            logger.log_info("one"); logger.log_warn("two"); logger.log_error("three"); logger.log_verbose("four")
            logger.log("five"); logger.log("six", logger.WARNING); logger.log("seven", level=logger.LogLevel.ERROR)
            return [respond(x_of(requests[0]))]
    """
    run(load(code), rows(1))
    records = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "headrace.model"]
    assert [level for level, _ in records] == ["INFO", "WARNING", "ERROR", "DEBUG", "INFO", "WARNING", "ERROR"]
    assert records[0] == ("INFO", "model m: one")


def test_metrics(load):
    code = """
    class TritonPythonModel:
        def initialize(self, args):
            family = pb_utils.MetricFamily(name="steps_total", description="Steps.", kind=pb_utils.MetricFamily.COUNTER)
            self.steps = family.Metric(labels={"model": args["model_name"]})
        def execute(self, requests):
            self.steps.increment(len(requests))
            return [respond(x_of(requests[0]))]
    """
    backend = load(code)
    run(backend, rows(1))
    (metric,) = backend.metrics()
    assert (metric.name, metric.help, metric.kind) == ("steps_total", "Steps.", "counter")
    assert (metric.labels, metric.value) == ((("model", "m"),), 1.0)
