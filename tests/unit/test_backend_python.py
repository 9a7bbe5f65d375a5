"""Models in Python: how they load, and how what they give is checked."""

import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest

from headrace.core.errors import NotFound
from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import InputError, LoadError, ModelCall, ModelSource, RequestInfo
from headrace_backends.python import Answer, PythonBackend

DECLARED = """
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}]
"""


def write(folder, code):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "model.py").write_text(textwrap.dedent(code))
    return folder


def load(folder, code, **keywords):
    return PythonBackend.load(ModelSource("m", "1", write(folder / "1", code), **keywords))


def run(backend, x=None):
    x = np.ones((3, 2), np.float32) if x is None else x
    return backend.execute({"x": x}, [RequestInfo(len(x), "", {})])


def giving(folder, expression, datatype="FP32", shape="[-1, 2]", size=0):
    return load(
        folder,
        f"""
import numpy as np, ml_dtypes
class Model:
    inputs = [{{"name": "x", "datatype": "FP32", "shape": [-1, 2]}}]
    outputs = [{{"name": "y", "datatype": "{datatype}", "shape": {shape}}}]
    max_batch_size = {size}
    def infer(self, inputs):
        return {expression}
""",
    )


LIFE = """
import helper

class Model:
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}]
    max_batch_size = 4

    def load(self, context):
        self.context = context
        self.factor = helper.FACTOR * context.parameters["scale"]

    def infer(self, inputs):
        return {"y": inputs["x"] * self.factor}

    def unload(self):
        (self.context.path / "gone").write_text(self.context.name)
"""


def test_life_of_a_model(tmp_path):
    modules = set(sys.modules)
    folder = write(tmp_path / "1", LIFE)
    (folder / "helper.py").write_text("import numpy as np\nFACTOR = np.float32(2)\n")
    backend = PythonBackend.load(ModelSource("m", "1", folder, parameters={"scale": np.float32(3)}))
    assert backend.signature.max_batch_size == 4
    assert run(backend)["y"].tolist() == [[6, 6]] * 3
    backend.close()
    assert (tmp_path / "1" / "gone").read_text() == "m"
    assert not (tmp_path / "1" / "__pycache__").exists()
    assert str(tmp_path / "1") not in sys.path
    assert set(sys.modules) == modules


def test_two_versions_keep_their_own_helpers(tmp_path):
    code = f"import helper\nclass Model:{DECLARED}\n    def infer(self, inputs): return {{'y': inputs['x'] * helper.F}}"
    backends = []
    for factor in (2, 5):
        folder = write(tmp_path / str(factor), code)
        (folder / "helper.py").write_text(f"import numpy as np\nF = np.float32({factor})")
        backends.append(PythonBackend.load(ModelSource("m", str(factor), folder / "model.py")))
    assert [float(run(backend)["y"][0, 0]) for backend in backends] == [2.0, 5.0]


def test_configuration_wins_over_the_class(tmp_path):
    inputs, outputs = (TensorSpec("a", DataType.INT8, None),), (TensorSpec("b", DataType.INT8, (-1,)),)
    backend = load(
        tmp_path,
        f"class Model:{DECLARED}\n    max_batch_size = 8\n    def infer(self, inputs): return {{'b': inputs['a']}}",
        inputs=inputs,
        outputs=outputs,
        max_batch_size=0,
    )
    assert backend.signature.inputs == inputs
    assert backend.signature.outputs == outputs
    assert backend.signature.max_batch_size == 0


MODEL = "class Model:\n    infer = id\n    inputs = outputs"


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("x = 1", "no class Model, nor a TritonPythonModel"),
        ("class TritonPythonModel: pass", r"no class TritonPythonModel with a method execute\(self, requests\)"),
        ("class Model: pass", "no method infer"),
        ("class Model:\n    async def infer(self, inputs): return {}", "Model.infer is async"),
        ("class Model:\n    async def infer(self, inputs): yield {}", "Model.infer is async"),
        (
            "class Model:\n    def infer(self, i): pass\n    def load(self, c): yield",
            "Model.load is a generator function",
        ),
        (
            f"class Model:{DECLARED}\n    def infer(self, inputs, request, more): return {{}}",
            r"needs the arguments \['inputs', 'request', 'more'\], expected infer\(self, inputs\), or",
        ),
        (f"class Model:{DECLARED}\n    def infer(self, inputs, *, more): return {{}}", r"\['inputs', 'more'\]"),
        (
            "class Model:\n    def infer(self, inputs): return {}",
            "inputs are not declared; declare them in config.yaml",
        ),
        (
            "\n\nimport no_such_module",
            r"ModuleNotFoundError: No module named 'no_such_module' \(model.py, line 3\); install",
        ),
        ("class Model:\n  def x(:", r"SyntaxError: .*\(model.py, line 2\)"),
        ("import sys\nsys.exit(3)", r"SystemExit: 3 \(model.py, line 2\)"),
        (
            f"class Model:{DECLARED}\n    def infer(self, i): pass\n    def load(self, context): raise KeyError('w')",
            r"fails in Model.load: KeyError: 'w' \(model.py, line 6\)",
        ),
        (
            f"class Model:{DECLARED}\n    def infer(self, i): pass\n    def __init__(self): 1 / 0",
            r"cannot make its Model: ZeroDivisionError: division by zero \(model.py, line 6\)",
        ),
        (
            f"{MODEL} = [dict(name='x', datatype='FP31'), 3]\n    outputs = []\n    max_batch_size = -1",
            r"inputs\[0\] has the datatype 'FP31'.*inputs\[1\] is 3.*outputs is \[\].*max_batch_size is -1",
        ),
        (
            f"{MODEL} = [dict(name='x', datatype='FP32', shape=[2, -1])]\n    max_batch_size = 2",
            r"max_batch_size is 2, but 'x' has shape \[2, -1\]",
        ),
        (
            f"{MODEL} = [dict(name='x', datatype='FP32', shape=[2], kind=1)]",
            r"unknown keys \['kind'\]",
        ),
    ],
)
def test_what_cannot_load_says_why(tmp_path, code, problem):
    modules = set(sys.modules)
    with pytest.raises(LoadError, match=problem):
        load(tmp_path, code)
    assert set(sys.modules) == modules


def test_missing_file(tmp_path):
    with pytest.raises(LoadError, match=r"no file 'model\.py'"):
        PythonBackend.load(ModelSource("m", "1", tmp_path))


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("None", "infer gave NoneType, expected a dict"),
        ("(x for x in [])", "a generator, and the model is not decoupled: make infer itself a generator function"),
        ("[]", r"gave a list of Answer but does not take the requests; expected infer\(self, inputs\), or"),
        ("[1]", "infer gave list, expected a dict"),
        ("{}", r"gave the outputs \[\], expected \['y'\]"),
        ("{'y': inputs['x'], 'z': 1}", r"gave the outputs \['y', 'z'\]"),
        ("{'y': inputs['x'].astype(np.float64)}", "output 'y' is an array of float64, expected FP32"),
        ("{'y': np.float64(1)}", "float64, expected FP32"),
        ("{'y': inputs['x'].astype('>f4')}", "expected FP32"),
        ("{'y': inputs['x'][:, :1]}", r"output 'y' has shape \[3, 1\], expected \[-1, 2\]"),
        ("{'y': inputs['x'][0]}", r"output 'y' has shape \[2\], expected \[-1, 2\]"),
        ("{'y': inputs['x'][:2]}", r"output 'y' has shape \[2, 2\], expected 3 rows"),
        ("{'y': ['a', 'b']}", "expected FP32"),
        ("{'y': [[1, 2], [3]]}", "expected FP32"),
        ("{'y': None}", "output 'y' is NoneType, expected FP32"),
    ],
)
def test_wrong_outputs_are_the_models_fault(tmp_path, expression, problem):
    with pytest.raises(RuntimeError, match=problem) as caught:
        run(giving(tmp_path, expression, size=8))
    assert "model 'm'" not in str(caught.value)  # the server says it


def test_without_batching_rows_are_free(tmp_path):
    assert run(giving(tmp_path, "{'y': inputs['x'][:2]}"))["y"].shape == (2, 2)


@pytest.mark.parametrize(
    ("value", "datatype", "expected"),
    [
        ("[1, 2]", "INT64", np.array([1, 2], np.int64)),
        ("[1, 2]", "FP16", np.array([1, 2], np.float16)),
        ("(0.5, 2)", "FP32", np.array([0.5, 2], np.float32)),
        ("[0.5]", "BF16", np.array([0.5], ml_dtypes.bfloat16)),
        ("[True]", "BOOL", np.array([True])),
        ("[]", "UINT8", np.array([], np.uint8)),
        ("[2**64 - 1]", "UINT64", np.array([2**64 - 1], np.uint64)),
        ("[1, 2**63]", "UINT64", np.array([1, 2**63], np.uint64)),
    ],
)
def test_python_lists_get_the_declared_type(tmp_path, value, datatype, expected):
    array = run(giving(tmp_path, f"{{'y': {value}}}", datatype, "[-1]"))["y"]
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


def test_python_scalar(tmp_path):
    array = run(giving(tmp_path, "{'y': 2.5}", "FP64", "[]"))["y"]
    assert array.shape == ()
    assert array == 2.5


@pytest.mark.parametrize(
    ("value", "datatype"),
    [
        ("[1.5]", "INT32"),
        ("[300]", "UINT8"),
        ("[-1]", "UINT64"),
        ("[-1, 2**63]", "UINT64"),
        ("[1.0, 2**63]", "UINT64"),
        ("[1]", "BOOL"),
        ("[True]", "FP32"),
    ],
)
def test_python_lists_that_would_lose_something_are_refused(tmp_path, value, datatype):
    with pytest.raises(RuntimeError, match=f"expected {datatype}"):
        run(giving(tmp_path, f"{{'y': {value}}}", datatype, "[-1]"))


@pytest.mark.parametrize(
    "value", ["['a', b'b']", "np.array(['a', 'b'])", "np.array([b'a', b'b'])", "np.array(['a', b'b'], object)"]
)
def test_text_in_all_its_forms(tmp_path, value):
    array = run(giving(tmp_path, f"{{'y': {value}}}", "BYTES", "[2]"))["y"]
    assert array.dtype == object
    assert [element if isinstance(element, str) else element.decode() for element in array] == ["a", "b"]


def test_text_with_a_number_in_it(tmp_path):
    with pytest.raises(RuntimeError, match="element of type int, expected BYTES"):
        run(giving(tmp_path, "{'y': ['a', 1]}", "BYTES", "[2]"))


def test_input_error_passes_through(tmp_path):
    backend = load(
        tmp_path,
        f"from headrace_backends.python import InputError\nclass Model:{DECLARED}\n"
        "    def infer(self, inputs): raise InputError('negative')",
    )
    with pytest.raises(InputError, match=r"^negative$"):
        run(backend)


class Stream:
    """What a worker gives ``begin``."""

    def __init__(self, rows=1, **said):
        self.request = RequestInfo(rows, **{"id": "", "parameters": {}, **said})
        self.cancelled = False


def begun(backend, x=None, **said):
    return backend.begin({"x": np.ones((3, 2), np.float32) if x is None else x}, Stream(3, **said))


def streaming(folder, body, **source):
    return load(
        folder,
        f"import numpy as np\nfrom headrace_backends.python import Answer\nclass Model:{DECLARED}\n{body}",
        **source,
    )


def test_generator_streams(tmp_path):
    code = (
        "    max_batch_size = 4\n    def infer(self, i):\n        yield {'y': i['x'][:1]}\n        yield {'y': i['x']}"
    )
    backend = streaming(tmp_path, code)
    assert backend.signature.decoupled
    assert backend.signature.max_batch_size == 4
    assert not backend.wants_requests
    assert [answer.outputs["y"].shape for answer in begun(backend)] == [(1, 2), (3, 2)]


def test_responses_are_made_one_at_a_time_and_ended_early(tmp_path):
    body = """
    def infer(self, inputs):
        made = self.made = []
        try:
            for _ in range(3):
                made.append(1)
                yield {"y": inputs["x"]}
        finally:
            made.append("ended")
"""
    backend = streaming(tmp_path, body)
    responses = begun(backend)
    next(responses)
    assert backend._model.made == [1]
    responses.close()
    assert backend._model.made == [1, "ended"]


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("        return {'y': inputs['x']}", [(3, 2)]),
        ("        return iter([{'y': inputs['x']}, {'y': inputs['x'][:2]}])", [(3, 2), (2, 2)]),
        ("        return (dict(y=inputs['x'][:n]) for n in (1, 0))", [(1, 2), (0, 2)]),
        ("        return iter(())", []),
    ],
)
def test_decoupled_by_configuration(tmp_path, body, outputs):
    backend = streaming(tmp_path, f"    def infer(self, inputs):\n{body}", decoupled=True)
    assert backend.signature.decoupled
    assert [answer.outputs["y"].shape for answer in begun(backend)] == outputs


@pytest.mark.parametrize(
    ("yielded", "problem"),
    [
        ("3", "infer yielded int, expected a dict"),
        ("{}", r"without outputs, expected some of \['y'\]"),
        ("{'z': inputs['x']}", r"gave the outputs \['z'\], expected some of \['y'\]"),
        ("{'y': inputs['x'][0]}", r"has shape \[2\], expected \[-1, 2\]"),
        ("{'y': inputs['x'].astype(int)}", "expected FP32"),
    ],
)
def test_wrong_responses(tmp_path, yielded, problem):
    backend = streaming(tmp_path, f"    def infer(self, inputs):\n        yield {yielded}")
    with pytest.raises((RuntimeError, TypeError), match=problem):
        next(begun(backend))


def test_a_part_of_the_outputs(tmp_path):
    code = (
        "class Model:\n    inputs = [dict(name='x', datatype='FP32')]\n    outputs = [dict(name='a', datatype='INT8'), "
    )
    code += "dict(name='b', datatype='INT8')]\n    def infer(self, i):\n        yield {'b': [1]}\n"
    code += "        yield {'a': [2], 'b': [3]}"
    assert [sorted(answer.outputs) for answer in begun(load(tmp_path, code))] == [["b"], ["a", "b"]]


def test_streamed_answers_may_be_errors_and_have_parameters(tmp_path):
    body = """
    def infer(self, inputs, request):
        yield Answer({"y": inputs["x"]}, {"token": request.id})
        yield Answer(error=ValueError("lost"))
"""
    first, second = begun(streaming(tmp_path, body), id="r7")
    assert first.parameters == {"token": "r7"}
    assert str(second.error) == "lost"


def test_requests_are_told_to_who_asks(tmp_path):
    body = (
        "    max_batch_size = 8\n    def infer(self, i, said):\n        self.said = said\n        return {'y': i['x']}"
    )
    backend = streaming(tmp_path, body)
    assert backend.wants_requests
    requests = [RequestInfo(1, "a", {"k": 1}), RequestInfo(2, "b", {})]
    backend.execute({"x": np.ones((3, 2), np.float32)}, requests)
    assert backend._model.said == requests


@pytest.mark.parametrize(
    ("parameters", "told"), [("request", True), ("request=None", True), ("scale=2", False), ("*more", False)]
)
def test_which_parameter_is_the_request(tmp_path, parameters, told):
    backend = streaming(tmp_path, f"    def infer(self, inputs, {parameters}): return {{'y': inputs['x']}}")
    assert backend.wants_requests is told
    assert run(backend)["y"].shape == (3, 2)


BY_ITSELF = """
    max_batch_size = 8
    def infer(self, inputs, requests):
        answers, start = [], 0
        for request in requests:
            rows = inputs["x"][start : start + request.rows]
            start += request.rows
            if request.id == "bad":
                answers.append(Answer(error=ValueError("no")))
            elif request.id == "short":
                answers.append(Answer({"y": rows[:-1]}))
            else:
                answers.append(Answer({"y": rows}, {"id": request.id}))
        return answers[: len(requests) - (requests[0].id == "few")]
"""


def test_an_answer_for_each_request(tmp_path):
    backend = streaming(tmp_path, BY_ITSELF)
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    names = ["good", "bad", "short", "last"]
    good, bad, short, last = backend.execute({"x": x}, [RequestInfo(1, name, {}) for name in names])
    np.testing.assert_array_equal(good.outputs["y"], x[:1])
    assert good.parameters == {"id": "good"}
    assert str(bad.error) == "no"
    assert "output 'y' has shape [0, 2], expected 1 rows" in str(short.error)
    np.testing.assert_array_equal(last.outputs["y"], x[3:])
    with pytest.raises(RuntimeError, match="infer gave 1 answers for 2 requests"):
        backend.execute({"x": x[:2]}, [RequestInfo(1, "few", {}), RequestInfo(1, "", {})])


def test_an_answer_may_leave_out_what_nobody_asked_for(tmp_path):
    code = "from headrace_backends.python import Answer\nclass Model:\n    inputs = [dict(name='x', datatype='FP32')]\n"
    code += "    outputs = [dict(name='a', datatype='INT8'), dict(name='b', datatype='INT8')]\n"
    code += "    def infer(self, inputs, requests): return [Answer({'b': [1]})]"
    backend = load(tmp_path, code)
    (answer,) = backend.execute({}, [RequestInfo(1, "", {}, ("b",))])
    assert answer.outputs["b"].tolist() == [1]
    (answer,) = backend.execute({}, [RequestInfo(1, "", {})])
    assert "gave the outputs ['b'], expected ['a', 'b']" in str(answer.error)


class Calls:
    """The server's side of a model's calls."""

    def __init__(self, *answers):
        self.calls, self.answers, self.closed = [], answers, False

    def infer(self, call):
        self.calls.append(call)
        return self.answers[0]

    def stream(self, call):
        self.calls.append(call)
        try:
            yield from self.answers
        finally:
            self.closed = True


CALLS = f"""class Model:{DECLARED}
    def load(self, context): self.context = context
    def infer(self, inputs):
        outputs = self.context.infer("other", inputs, version=3, outputs=["z"], parameters={{"k": 1}}, timeout_s=0.5)
        return {{"y": outputs["z"]}}
"""


def test_calling_another_model(tmp_path):
    z = np.full((3, 2), 5, np.float32)
    calls = Calls(Answer({"z": z}))
    x = np.ones((3, 2), np.float32)
    assert run(load(tmp_path, CALLS, calls=calls), x)["y"] is z
    (call,) = calls.calls
    assert call == ModelCall("other", {"x": x}, "3", ("z",), "", {"k": 1}, 500_000)


def test_what_the_other_model_could_not(tmp_path):
    with pytest.raises(NotFound, match="no other"):
        run(load(tmp_path, CALLS, calls=Calls(Answer(error=NotFound("no other")))))


def test_calls_need_a_server(tmp_path):
    with pytest.raises(RuntimeError, match="'other' cannot be called: this one was loaded without a server"):
        run(load(tmp_path, CALLS))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("{'a': [1]}", "input 'a' for the model 'o' is list, expected an array"),
        ("{'a': np.ones(1, complex)}", "is an array of complex128"),
        ("{}, timeout_s=0", "timeout_s for the model 'o' is 0, expected more than 0"),
        ("{}, timeout_s=float('nan')", "timeout_s for the model 'o' is nan"),
    ],
)
@pytest.mark.parametrize("verb", ["infer", "stream"])
def test_calls_that_make_no_sense(tmp_path, verb, arguments, problem):
    body = f"    def load(self, c): self.c = c\n    def infer(self, inputs): self.c.{verb}('o', {arguments})"
    with pytest.raises((TypeError, ValueError), match=problem):
        run(streaming(tmp_path, body, calls=Calls()))


def test_calling_a_model_that_streams(tmp_path):
    calls = Calls(*(Answer({"z": np.full((1, 2), n, np.float32)}) for n in range(3)))
    body = """
    def load(self, context): self.context = context
    def infer(self, inputs):
        for part in self.context.stream("other", inputs):
            yield {"y": part["z"]}
"""
    backend = streaming(tmp_path, body, calls=calls)
    assert [float(answer.outputs["y"][0, 0]) for answer in begun(backend)] == [0.0, 1.0, 2.0]
    calls.closed = False
    responses = begun(backend)
    next(responses)
    responses.close()
    assert calls.closed


def test_its_own_environment_is_refused(tmp_path):
    with pytest.raises(LoadError, match="EXECUTION_ENV_PATH is not offered: install the packages"):
        load(tmp_path, "x = 1", parameters={"EXECUTION_ENV_PATH": "env.tar.gz"})


def test_relative_imports(tmp_path):
    code = f"from .helper import F\nclass Model:{DECLARED}\n    def infer(self, i): return {{'y': i['x'] * F}}"
    folder = write(tmp_path / "1", code)
    (folder / "helper.py").write_text("import numpy as np\nF = np.float32(4)")
    modules = set(sys.modules)
    backend = PythonBackend.load(ModelSource("m", "1", folder))
    assert run(backend)["y"][0, 0] == 4
    backend.close()
    assert set(sys.modules) == modules
