"""The models that Triton's published client and Python-backend examples ask for, each made from scratch."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# What Triton's own example repository holds: the model control examples count the models there.
PUBLISHED = (
    "densenet_onnx",
    "inception_onnx",
    "simple",
    "simple_dyna_sequence",
    "simple_identity",
    "simple_int8",
    "simple_sequence",
    "simple_string",
)

Files = Mapping[str, bytes]  # by path within the model's folder


def build(folder: Path, names: Collection[str] = ()) -> Path:
    """Write these models into ``folder``, or all of them where none is named."""
    for name in names or MODELS:
        write(folder, name, MODELS[name](name))
    return folder


def write(folder: Path, name: str, files: Files) -> None:
    """Write one model."""
    for path, content in files.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_bytes(content)


# ---- config.pbtxt ----


def _config(name: str, runs: str, tensors: str, max_batch_size: int = 0) -> bytes:
    return f'name: "{name}"\n{runs}\nmax_batch_size: {max_batch_size}\n{tensors}'.encode()


def _tensors(way: str, *tensors: tuple[str, str, str], more: str = "") -> str:
    listed = (
        f'  {{ name: "{name}" data_type: TYPE_{datatype} dims: [ {dims} ] {more} }}' for name, datatype, dims in tensors
    )
    return f"{way} [\n" + ",\n".join(listed) + "\n]\n"


def _two_and_two(datatype: str, dims: str) -> str:
    inputs = _tensors("input", *((f"INPUT{index}", datatype, dims) for index in (0, 1)))
    return inputs + _tensors("output", *((f"OUTPUT{index}", datatype, dims) for index in (0, 1)))


ONNX = 'platform: "onnxruntime_onnx"'
PYTHON = 'backend: "python"\ninstance_group [{ kind: KIND_CPU }]'
DECOUPLED = f"{PYTHON}\nmodel_transaction_policy {{ decoupled: True }}"


# ---- ONNX ----


def _onnx(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, list[int | str]]],
    outputs: Mapping[str, tuple[int, list[int | str]]],
    constants: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "example",
        [helper.make_tensor_value_info(name, *what) for name, what in inputs.items()],
        [helper.make_tensor_value_info(name, *what) for name, what in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model)
    return model.SerializeToString()


def add_sub(name: str, datatype: str = "INT32", max_batch_size: int = 8) -> Files:
    """OUTPUT0 = INPUT0 + INPUT1 and OUTPUT1 = INPUT0 - INPUT1, 16 of each; of BYTES, the numbers that they spell."""
    kind = {"INT32": TensorProto.INT32, "INT8": TensorProto.INT8, "STRING": TensorProto.STRING}[datatype]
    nodes = [helper.make_node("Cast", [f"INPUT{index}"], [f"number{index}"], to=TensorProto.INT32) for index in (0, 1)]
    for index, operator in enumerate(("Add", "Sub")):
        nodes += [
            helper.make_node(operator, ["number0", "number1"], [f"result{index}"]),
            helper.make_node("Cast", [f"result{index}"], [f"OUTPUT{index}"], to=kind),
        ]
    shape: list[int | str] = ["rows", 16] if max_batch_size else [16]
    graph = _onnx(
        nodes,
        {f"INPUT{index}": (kind, shape) for index in (0, 1)},
        {f"OUTPUT{index}": (kind, shape) for index in (0, 1)},
    )
    return {"config.pbtxt": _config(name, ONNX, _two_and_two(datatype, "16"), max_batch_size), "1/model.onnx": graph}


def _identity(name: str, datatype: str, kind: int) -> Files:
    tensors = _tensors("input", ("INPUT0", datatype, "-1")) + _tensors("output", ("OUTPUT0", datatype, "-1"))
    shape: list[int | str] = ["rows", "columns"]
    graph = _onnx(
        [helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])], {"INPUT0": (kind, shape)}, {"OUTPUT0": (kind, shape)}
    )
    return {"config.pbtxt": _config(name, ONNX, tensors, 8), "1/model.onnx": graph}


# ---- stateful models ----


def _flag(name: str, kind: str) -> str:
    return f'{{ name: "{name}" control [{{ kind: CONTROL_SEQUENCE_{kind} int32_false_true: [ 0, 1 ] }}] }}'


def _sequence(name: str, scheduling: str, graph: bytes) -> Files:
    tensors = _tensors("input", ("INPUT", "INT32", "1")) + _tensors("output", ("OUTPUT", "INT32", "1"))
    config = _config(name, ONNX, tensors + f"sequence_batching {{\n{scheduling}\n}}\n", 8)
    return {"config.pbtxt": config, "1/model.onnx": graph}


def _simple_sequence(name: str) -> Files:
    """OUTPUT = INPUT, and one more where a sequence begins; 0 in a row that nobody has."""
    number = (TensorProto.INT32, ["rows", 1])
    graph = _onnx(
        [
            helper.make_node("Add", ["INPUT", "START"], ["begun"]),
            helper.make_node("Mul", ["begun", "READY"], ["OUTPUT"]),
        ],
        dict.fromkeys(("INPUT", "START", "READY"), number),
        {"OUTPUT": number},
    )
    controls = f"  control_input [ {_flag('START', 'START')}, {_flag('READY', 'READY')} ]"
    return _sequence(name, controls, graph)


def _simple_dyna_sequence(name: str) -> Files:
    """As simple_sequence, and where a sequence ends its id is added."""
    number = (TensorProto.INT32, ["rows", 1])
    graph = _onnx(
        [
            helper.make_node("Cast", ["CORRID"], ["id"], to=TensorProto.INT32),
            helper.make_node("Mul", ["END", "id"], ["last"]),
            helper.make_node("Add", ["INPUT", "START"], ["begun"]),
            helper.make_node("Add", ["begun", "last"], ["sum"]),
            helper.make_node("Mul", ["sum", "READY"], ["OUTPUT"]),
        ],
        {**dict.fromkeys(("INPUT", "START", "END", "READY"), number), "CORRID": (TensorProto.UINT64, ["rows", 1])},
        {"OUTPUT": number},
    )
    scheduling = f"""
  max_sequence_idle_microseconds: 10000000
  oldest {{ max_candidate_sequences: 1024 max_queue_delay_microseconds: 10000 }}
  control_input [
    {_flag("START", "START")}, {_flag("END", "END")}, {_flag("READY", "READY")},
    {{ name: "CORRID" control [{{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }}] }}
  ]"""
    return _sequence(name, scheduling, graph)


def _simple_string_dyna_sequence(name: str) -> Files:
    """OUTPUT is the sum of a sequence's INPUTs so far; where it ends, the number that its id spells is added.

    The server keeps the sum as an implicit state.
    """
    number = (TensorProto.INT32, ["rows", 1])
    graph = _onnx(
        [
            helper.make_node("Cast", ["CORRID"], ["id"], to=TensorProto.INT32),
            helper.make_node("Mul", ["END", "id"], ["last"]),
            helper.make_node("Add", ["INPUT", "SUM_BEFORE"], ["SUM_AFTER"]),
            helper.make_node("Add", ["SUM_AFTER", "last"], ["OUTPUT"]),
        ],
        {**dict.fromkeys(("INPUT", "END", "SUM_BEFORE"), number), "CORRID": (TensorProto.STRING, ["rows", 1])},
        {"OUTPUT": number, "SUM_AFTER": number},
    )
    scheduling = f"""
  max_sequence_idle_microseconds: 10000000
  oldest {{ max_candidate_sequences: 1024 }}
  control_input [
    {_flag("END", "END")},
    {{ name: "CORRID" control [{{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING }}] }}
  ]
  state [{{
    input_name: "SUM_BEFORE" output_name: "SUM_AFTER" data_type: TYPE_INT32 dims: [ 1 ]
    initial_state: {{ name: "zero" data_type: TYPE_INT32 dims: [ 1 ] zero_data: true }}
  }}]"""
    return _sequence(name, scheduling, graph)


# ---- image classifiers ----

INCEPTION_OUTPUT = "InceptionV3/Predictions/Softmax"
_CHANNELS = 8


def _classifier(
    pixels: str, scores: str, size: int, classes: int
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """From ``pixels``, channels first, to the probability of each class.

    It has learnt nothing, but always says the same of a picture, and different things of different ones.
    """
    generator = np.random.default_rng(299)
    constants = {
        "kernels": generator.normal(0, 0.2, (_CHANNELS, 3, 16, 16)).astype(np.float32),
        "weights": generator.normal(0, 4, (_CHANNELS, classes)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", [pixels, "kernels"], ["seen"], strides=[size // 8, size // 8]),
        helper.make_node("Tanh", ["seen"], ["bounded"]),
        helper.make_node("GlobalAveragePool", ["bounded"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("MatMul", ["features", "weights"], ["sums"]),
        helper.make_node("Softmax", ["sums"], [scores]),
    ]
    return nodes, constants


def _labels(classes: int) -> bytes:
    return "".join(f"thing {index}\n" for index in range(classes)).encode()


def _inception(name: str) -> Files:
    """299 x 299 pixels, channels last, into 1001 classes."""
    nodes, constants = _classifier("pixels", INCEPTION_OUTPUT, 299, 1001)
    graph = _onnx(
        [helper.make_node("Transpose", ["input"], ["pixels"], perm=[0, 3, 1, 2]), *nodes],
        {"input": (TensorProto.FLOAT, ["rows", 299, 299, 3])},
        {INCEPTION_OUTPUT: (TensorProto.FLOAT, ["rows", 1001])},
        constants,
    )
    tensors = _tensors("input", ("input", "FP32", "299, 299, 3"), more="format: FORMAT_NHWC")
    tensors += _tensors("output", (INCEPTION_OUTPUT, "FP32", "1001"), more='label_filename: "inception_labels.txt"')
    return {
        "config.pbtxt": _config(name, ONNX, tensors, 128),
        "inception_labels.txt": _labels(1001),
        "1/model.onnx": graph,
    }


def _densenet(name: str) -> Files:
    """224 x 224 pixels, channels first, into 1000 classes; clients know nothing of the file's own dimensions of 1."""
    nodes, constants = _classifier("data_0", "flat", 224, 1000)
    constants["shape"] = np.array([1, 1000, 1, 1], np.int64)
    graph = _onnx(
        [*nodes, helper.make_node("Reshape", ["flat", "shape"], ["fc6_1"])],
        {"data_0": (TensorProto.FLOAT, [1, 3, 224, 224])},
        {"fc6_1": (TensorProto.FLOAT, [1, 1000, 1, 1])},
        constants,
    )
    of_input = "format: FORMAT_NCHW reshape { shape: [ 1, 3, 224, 224 ] }"
    of_output = 'label_filename: "densenet_labels.txt" reshape { shape: [ 1, 1000, 1, 1 ] }'
    tensors = _tensors("input", ("data_0", "FP32", "3, 224, 224"), more=of_input)
    tensors += _tensors("output", ("fc6_1", "FP32", "1000"), more=of_output)
    return {
        "config.pbtxt": _config(name, ONNX, tensors),
        "densenet_labels.txt": _labels(1000),
        "1/model.onnx": graph,
    }


_PREPROCESS = """
import io

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        files = pb_utils.get_input_tensor_by_name(request, "INPUT").as_numpy()
        try:
            pictures = np.stack([self.pixels(file) for file in files.reshape(-1)])
        except OSError as error:
            refusal = pb_utils.TritonError(f"INPUT is no picture: {error}", pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refusal)
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", pictures)])

    def pixels(self, file):
        with Image.open(io.BytesIO(file)) as picture:
            small = picture.convert("RGB").resize((299, 299), Image.Resampling.BILINEAR)
        return np.asarray(small, np.float32) / np.float32(127.5) - np.float32(1)
"""


def _preprocess(name: str) -> Files:
    """Files of pictures into what inception takes."""
    tensors = _tensors("input", ("INPUT", "STRING", "1")) + _tensors("output", ("OUTPUT", "FP32", "299, 299, 3"))
    return _python(_config(name, PYTHON, tensors, 128), _PREPROCESS)


def _ensemble(name: str) -> Files:
    """Files of pictures into probabilities."""
    tensors = _tensors("input", ("INPUT", "STRING", "1")) + _tensors("output", ("OUTPUT", "FP32", "1001"))
    steps = f"""ensemble_scheduling {{
  step [
    {{
      model_name: "image_preprocess_nhwc_299x299x3_inception" model_version: -1
      input_map {{ key: "INPUT" value: "INPUT" }}
      output_map {{ key: "OUTPUT" value: "preprocessed_image" }}
    }},
    {{
      model_name: "inception_onnx" model_version: -1
      input_map {{ key: "input" value: "preprocessed_image" }}
      output_map {{ key: "{INCEPTION_OUTPUT}" value: "OUTPUT" }}
    }}
  ]
}}
"""
    return {"config.pbtxt": _config(name, 'platform: "ensemble"', tensors + steps, 128)}


# ---- Python models ----


def _python(config: bytes, code: str) -> Files:
    return {"config.pbtxt": config, "1/model.py": code.encode()}


_ADD_SUB = """
import json

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.dtypes = [
            pb_utils.triton_string_to_numpy(pb_utils.get_output_config_by_name(config, name)["data_type"])
            for name in ("OUTPUT0", "OUTPUT1")
        ]

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        left, right = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("INPUT0", "INPUT1")
        )
        results = (left + right, left - right)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor(f"OUTPUT{index}", result.astype(dtype))
                for index, (result, dtype) in enumerate(zip(results, self.dtypes))
            ]
        )
"""

_COMPLETED = """

    @staticmethod
    def auto_complete_config(config):
        assert not config.as_dict()["input"]
        for index in (0, 1):
            config.add_input({"name": f"INPUT{index}", "data_type": "TYPE_FP32", "dims": [4]})
            config.add_output({"name": f"OUTPUT{index}", "data_type": "TYPE_FP32", "dims": [4]})
        config.set_max_batch_size(%d)
        %s
        return config
"""

_METRICS = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.family = pb_utils.MetricFamily(
            name="example_values_seen", description="Values that came in", kind=pb_utils.MetricFamily.COUNTER
        )
        self.seen = self.family.Metric(labels={"model": args["model_name"], "version": args["model_version"]})

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        values = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
        self.seen.increment(values.size)
        pb_utils.Logger.log_info(f"values seen so far: {self.seen.value()}")
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", values)])
"""

_BLS_SYNC = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        name = pb_utils.get_input_tensor_by_name(request, "MODEL_NAME").as_numpy()[0]
        call = pb_utils.InferenceRequest(
            model_name=name,
            requested_output_names=["OUTPUT0", "OUTPUT1"],
            inputs=[pb_utils.get_input_tensor_by_name(request, one) for one in ("INPUT0", "INPUT1")],
        )
        response = call.exec()
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        return pb_utils.InferenceResponse(output_tensors=response.output_tensors())
"""

_BLS_ASYNC = """
import asyncio

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    async def execute(self, requests):
        return list(await asyncio.gather(*map(self.answer, requests)))

    async def answer(self, request):
        inputs = [pb_utils.get_input_tensor_by_name(request, one) for one in ("INPUT0", "INPUT1")]
        calls = [
            pb_utils.InferenceRequest(model_name=name, requested_output_names=["OUTPUT0", "OUTPUT1"], inputs=inputs)
            for name in ("add_sub", "nobatch_auto_complete")
        ]
        one, other = await asyncio.gather(*(call.async_exec() for call in calls))
        for response in (one, other):
            if response.has_error():
                raise pb_utils.TritonModelException(response.error().message())
        return pb_utils.InferenceResponse(
            [pb_utils.get_output_tensor_by_name(one, "OUTPUT0"), pb_utils.get_output_tensor_by_name(other, "OUTPUT1")]
        )
"""

_REPEAT = """
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.threads = []

    def execute(self, requests):
        for request in requests:
            values, delays_ms, wait_ms = (
                pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("IN", "DELAY", "WAIT")
            )
            if values.shape != delays_ms.shape:
                raise pb_utils.TritonModelException(f"IN has shape {values.shape} and DELAY {delays_ms.shape}")
            thread = threading.Thread(target=self.answer, args=(request.get_response_sender(), values, delays_ms))
            self.threads.append(thread)
            thread.start()
            time.sleep(int(wait_ms[0]) / 1000)
        return None

    def answer(self, sender, values, delays_ms):
        for index, (value, delay_ms) in enumerate(zip(values, delays_ms)):
            time.sleep(int(delay_ms) / 1000)
            outputs = {"OUT": np.array([value], np.int32), "IDX": np.array([index], np.uint32)}
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor(*output) for output in outputs.items()]))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self):
        for thread in self.threads:
            thread.join()
"""

_SQUARE = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        import json

        assert pb_utils.using_decoupled_model_transaction_policy(json.loads(args["model_config"]))

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            (count,) = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
            for _ in range(count):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.array([count], np.int32))]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

_SUM_OF_SQUARES_SYNC = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        call = pb_utils.InferenceRequest(
            model_name="square_int32",
            inputs=[pb_utils.get_input_tensor_by_name(request, "IN")],
            requested_output_names=["OUT"],
        )
        total = np.zeros(1, np.int32)
        for response in call.exec(decoupled=True):
            if response.has_error():
                raise pb_utils.TritonModelException(response.error().message())
            if response.output_tensors():
                total += pb_utils.get_output_tensor_by_name(response, "OUT").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("SUM", total)])
"""

_SUM_OF_SQUARES_ASYNC = """
import asyncio

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    async def execute(self, requests):
        return [await self.answer(request) for request in requests]

    async def answer(self, request):
        calls = [
            pb_utils.InferenceRequest(
                model_name="square_int32",
                inputs=[pb_utils.get_input_tensor_by_name(request, "IN")],
                requested_output_names=["OUT"],
            )
            for _ in range(2)
        ]
        total = np.zeros(1, np.int32)
        for responses in await asyncio.gather(*(call.async_exec(decoupled=True) for call in calls)):
            for response in responses:
                if response.has_error():
                    raise pb_utils.TritonModelException(response.error().message())
                if response.output_tensors():
                    total += pb_utils.get_output_tensor_by_name(response, "OUT").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("SUM", total)])
"""

_ERROR_SOURCE = """
import triton_python_backend_utils as pb_utils

CODES = ["UNKNOWN", "INTERNAL", "NOT_FOUND", "INVALID_ARG", "UNAVAILABLE", "UNSUPPORTED", "ALREADY_EXISTS", "CANCELLED"]


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        (code,) = pb_utils.get_input_tensor_by_name(request, "ERROR_CODE").as_numpy()
        error = pb_utils.TritonError(f"as asked, error {code}", getattr(pb_utils.TritonError, CODES[code]))
        return pb_utils.InferenceResponse(error=error)
"""

_ERROR_CALLER = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        call = pb_utils.InferenceRequest(
            model_name="error_source",
            requested_output_names=["OUTPUT"],
            inputs=[pb_utils.get_input_tensor_by_name(request, "ERROR_CODE")],
        )
        error = call.exec().error()
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("RECEIVED_CODE", np.array([error.code()], np.int32)),
                pb_utils.Tensor("ERROR_MESSAGE", np.array([error.message()], np.object_)),
            ]
        )
"""


def _completing(name: str, max_batch_size: int, batching: str) -> Files:
    """An add_sub that says itself what it takes: the configuration has but a name."""
    code = _ADD_SUB + _COMPLETED % (max_batch_size, batching)
    return _python(f'name: "{name}"\nbackend: "python"\n'.encode(), code)


_NUMBERS = _two_and_two("FP32", "4")
_MODEL_NAME = _tensors("input", ("MODEL_NAME", "STRING", "1"))
_REPEATED = _tensors("input", ("IN", "INT32", "-1"), ("DELAY", "UINT32", "-1"), ("WAIT", "UINT32", "1")) + _tensors(
    "output", ("OUT", "INT32", "1"), ("IDX", "UINT32", "1")
)
_SQUARED = _tensors("input", ("IN", "INT32", "1")) + _tensors("output", ("OUT", "INT32", "1"))
_SUMMED = _tensors("input", ("IN", "INT32", "1")) + _tensors("output", ("SUM", "INT32", "1"))
_SEEN = _tensors("input", ("INPUT0", "FP32", "4")) + _tensors("output", ("OUTPUT0", "FP32", "4"))
_CODE = _tensors("input", ("ERROR_CODE", "INT32", "1"))
_RECEIVED = _tensors("output", ("RECEIVED_CODE", "INT32", "1"), ("ERROR_MESSAGE", "STRING", "1"))

MODELS: Mapping[str, Callable[[str], Files]] = {
    # Those that the client examples use.
    "simple": add_sub,
    "simple_string": lambda name: add_sub(name, "STRING"),
    "simple_int8": lambda name: add_sub(name, "INT8"),
    "simple_no_batch": lambda name: add_sub(name, max_batch_size=0),
    "simple_identity": lambda name: _identity(name, "STRING", TensorProto.STRING),
    "custom_identity_int32": lambda name: _identity(name, "INT32", TensorProto.INT32),
    "simple_sequence": _simple_sequence,
    "simple_dyna_sequence": _simple_dyna_sequence,
    "simple_string_dyna_sequence": _simple_string_dyna_sequence,
    "inception_onnx": _inception,
    "inception_graphdef": _inception,  # what older examples call it
    "densenet_onnx": _densenet,
    "image_preprocess_nhwc_299x299x3_inception": _preprocess,
    "preprocess_inception_ensemble": _ensemble,
    "repeat_int32": lambda name: _python(_config(name, DECOUPLED, _REPEATED), _REPEAT),
    # Those of the Python backend's examples.
    "square_int32": lambda name: _python(_config(name, DECOUPLED, _SQUARED), _SQUARE),
    "add_sub": lambda name: _python(_config(name, PYTHON, _NUMBERS), _ADD_SUB),
    "nobatch_auto_complete": lambda name: _completing(name, 0, ""),
    "batch_auto_complete": lambda name: _completing(name, 4, "config.set_dynamic_batching()"),
    "bls_sync": lambda name: _python(_config(name, PYTHON, _NUMBERS + _MODEL_NAME), _BLS_SYNC),
    "bls_async": lambda name: _python(_config(name, PYTHON, _NUMBERS), _BLS_ASYNC),
    "bls_decoupled_sync": lambda name: _python(_config(name, PYTHON, _SUMMED), _SUM_OF_SQUARES_SYNC),
    "bls_decoupled_async": lambda name: _python(_config(name, PYTHON, _SUMMED), _SUM_OF_SQUARES_ASYNC),
    "error_source": lambda name: _python(
        _config(name, PYTHON, _CODE + _tensors("output", ("OUTPUT", "FP32", "1"))), _ERROR_SOURCE
    ),
    "bls_error_caller": lambda name: _python(_config(name, PYTHON, _CODE + _RECEIVED), _ERROR_CALLER),
    "custom_metrics": lambda name: _python(_config(name, PYTHON, _SEEN), _METRICS),
}
