"""Models in Python: how they load, and how what they give is checked."""

import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import InputError, LoadError, ModelSource, RequestInfo
from headrace_backends.python import PythonBackend

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
    np.testing.assert_array_equal(run(backend)["y"], np.full((3, 2), 6, np.float32))
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
        ("x = 1", "no class Model"),
        ("class TritonPythonModel: pass", "TritonPythonModel: rename"),
        ("class Model: pass", "no method infer"),
        ("class Model:\n    async def infer(self, inputs): return {}", "Model.infer is async"),
        ("class Model:\n    def infer(self, inputs): yield {}", "streamed answers are not offered"),
        (
            "class Model:\n    def infer(self, inputs): return {}",
            "inputs are not declared; declare them in config.yaml",
        ),
        ("\n\nimport no_such_module", r"ModuleNotFoundError: No module named 'no_such_module' \(model.py, line 3\)"),
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
        ("(x for x in [])", "streamed answers are not offered yet"),
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
    [("[1.5]", "INT32"), ("[300]", "UINT8"), ("[-1]", "UINT64"), ("[1]", "BOOL"), ("[True]", "FP32")],
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
