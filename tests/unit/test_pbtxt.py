"""config.pbtxt and JSON in, Triton's configuration message and its JSON out."""

import json

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.model import ModelInfo, Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace.repository.from_triton import IGNORED, REFUSED, from_message
from headrace.repository.message_json import to_json
from headrace.repository.model_config import ConfigError, ModelConfig, parse_config
from headrace.repository.pbtxt import parse_json, parse_pbtxt
from headrace.repository.to_triton import to_message
from headrace.wire import pb

RESNET = """
name: "resnet"
platform: "onnxruntime_onnx"
max_batch_size: 16
input [ { name: "data" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, 224, 224 ] } ]
input { name: "mask" data_type: TYPE_BOOL dims: -1 optional: true }
output [ { name: "prob" data_type: TYPE_STRING dims: [ 1000 ] reshape { shape: [ 1000 ] }
           label_filename: "labels.txt" } ]
instance_group [
  { count: 2 kind: KIND_GPU gpus: [ 0, 3 ]
    rate_limiter { resources [ { name: "R1" count: 4 }, { name: "R2" global: true count: 2 }, { name: "R3" } ]
                   priority: 2 } },
  { kind: KIND_CPU rate_limiter {} }
]
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 100
  priority_levels: 4
  default_priority_level: 3
  default_queue_policy { default_timeout_microseconds: 7 max_queue_size: 64 allow_timeout_override: true }
  priority_queue_policy [
    { key: 1 value { timeout_action: DELAY default_timeout_microseconds: 9 } },
    { key: 4 value { max_queue_size: 2 allow_timeout_override: true } }
  ]
}
version_policy: { specific { versions: [ 1, 3 ] } }
default_model_filename: "net.onnx"
parameters { key: "intra_op_thread_count" value { string_value: "2" } }
metric_tags { key: "team" value: "vision" }
model_warmup { name: "w" batch_size: 1 }
optimization { graph { level: 1 } eager_batching: true }
response_cache { enable: false }
model_transaction_policy { decoupled: false }
"""


def problems_of(text, folder_name="m"):
    with pytest.raises(ConfigError) as caught:
        parse_pbtxt(text, folder_name)
    return caught.value.problems


def tensor(**more):
    fields = {"name": '"x"', "data_type": "TYPE_FP32", "dims": "[4]", **more}
    return "{ " + " ".join(f"{key}: {value}" for key, value in fields.items()) + " }"


def sequence(*parts):
    return f"sequence_batching {{ {' '.join(parts)} }}"


def state(**more):
    fields = {"input_name": '"s"', "output_name": '"t"', "data_type": "TYPE_INT32", "dims": "[-1]", **more}
    return f"state {{ {' '.join(f'{key}: {value}' for key, value in fields.items())} }}"


def initial(data_type, dims, data):
    return state(initial_state=f"{{ data_type: {data_type} dims: {dims} name: 'initial' {data} }}")


def control(kind, values):
    return f"control_input {{ name: 'C' control {{ kind: {kind} {values} }} }}"


def step_of(more):
    name = "" if "model_name:" in more else "model_name: 'a'"
    return f"ensemble_scheduling {{ step {{ {name} output_map {{ key: 'y' value: 'y' }} {more} }} }}"


def test_a_whole_file():
    config = parse_pbtxt(RESNET, "resnet")
    assert config == parse_config("""
backend: onnxruntime
max_batch_size: 16
inputs:
- {name: data, datatype: FP32, format: NCHW, shape: [-1, 3, 224, 224]}
- {name: mask, datatype: BOOL, shape: [-1, -1], optional: true}
outputs: [{name: prob, datatype: BYTES, shape: [-1, 1000], labels: labels.txt}]
instances:
- {device: "gpu:0", count: 2, rate_limit: {resources: {R1: 4}, global_resources: {R2: 2}, priority: 2}}
- {device: "gpu:3", count: 2, rate_limit: {resources: {R1: 4}, global_resources: {R2: 2}, priority: 2}}
- {device: cpu}
batching:
  preferred_sizes: [4, 8]
  max_queue_delay_us: 100
  priority_levels: 4
  default_priority: 3
  default_timeout_us: 7
  max_queue_size: 64
  priorities:
    1: {timeout_action: delay, default_timeout_us: 9, max_queue_size: 1024, allow_timeout_override: false}
    4: {timeout_action: reject, default_timeout_us: 0, max_queue_size: 2, allow_timeout_override: true}
versions: {only: [1, 3]}
model_file: net.onnx
parameters: {intra_op_threads: "2"}
""")


TOO_LONG = "default_timeout_microseconds: 18446744073709551615"
STATEFUL = """
platform: "onnxruntime_onnx"
max_batch_size: 8
sequence_batching {
  max_sequence_idle_microseconds: 5000000
  oldest {
    max_candidate_sequences: 4 preferred_batch_size: [ 2, 8 ] max_queue_delay_microseconds: 100 preserve_ordering: true
  }
  control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } ] },
    { name: "READY" control [ { kind: CONTROL_SEQUENCE_READY int32_false_true: [ -1, 1 ] } ] },
    { name: "END" control [ { kind: CONTROL_SEQUENCE_END bool_false_true: [ false, true ] } ] },
    { name: "CORRID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } ] }
  ]
  state [
    { input_name: "s" output_name: "t" data_type: TYPE_INT32 dims: [ -1 ]
      initial_state: { data_type: TYPE_INT32 dims: [ 1 ] zero_data: true name: "initial state" } },
    { input_name: "u" output_name: "v" data_type: TYPE_STRING dims: [ 2, 3 ] use_same_buffer_for_input_output: true
      initial_state: { data_type: TYPE_STRING dims: [ 2, 3 ] data_file: "begin" } }
  ]
}
"""

STATEFUL_HERE = """
backend: onnxruntime
max_batch_size: 8
batching: {max_queue_delay_us: 100, preferred_sizes: [2, 8], preserve_order: true}
sequence:
  strategy: oldest
  max_idle_us: 5000000
  max_candidates: 4
  controls:
  - {input: START, kind: start, datatype: FP32, values: [0, 1]}
  - {input: READY, kind: ready, datatype: INT32, values: [-1, 1]}
  - {input: END, kind: end, datatype: BOOL, values: [false, true]}
  - {input: CORRID, kind: correlation_id, datatype: BYTES}
  states:
  - {input: s, output: t, datatype: INT32, shape: [-1]}
  - {input: u, output: v, datatype: BYTES, shape: [2, 3], initial: begin}
"""


def test_sequences():
    assert parse_pbtxt(STATEFUL, "m") == parse_config(STATEFUL_HERE)


@pytest.mark.parametrize(
    ("text", "here"),
    [
        ("", "sequence: {}"),
        ("direct {}", "sequence: {strategy: direct}"),
        (
            "direct { max_queue_delay_microseconds: 7 minimum_slot_utilization: 0.5 }",
            "sequence: {minimum_slot_utilization: 0.5}\nbatching: {max_queue_delay_us: 7}",
        ),
        ("oldest {}", "sequence: {strategy: oldest}"),
    ],
)
def test_strategies(text, here):
    assert parse_pbtxt(f"sequence_batching {{ {text} }}", "m") == parse_config(here)


ENSEMBLE = """
platform: "ensemble"
max_batch_size: 4
input { name: "image" data_type: TYPE_UINT8 dims: [ -1 ] }
output { name: "class" data_type: TYPE_FP32 dims: [ 10 ] }
ensemble_scheduling {
  max_inflight_requests: 4
  step [
    { model_name: "decode" model_version: -1 input_map { key: "raw" value: "image" }
      output_map { key: "pixels" value: "pixels" } },
    { model_name: "classify" model_version: 3 input_map { key: "x" value: "pixels" }
      output_map { key: "y" value: "class" } }
  ]
}
response_cache { enable: true }
"""

ENSEMBLE_HERE = """
backend: ensemble
max_batch_size: 4
inputs: [{name: image, datatype: UINT8, shape: [-1, -1]}]
outputs: [{name: class, datatype: FP32, shape: [-1, 10]}]
ensemble:
- {model: decode, inputs: {raw: image}, outputs: {pixels: pixels}}
- {model: classify, version: 3, inputs: {x: pixels}, outputs: {y: class}}
response_cache: true
"""


@pytest.mark.parametrize("named", ['platform: "ensemble"', 'backend: "ensemble"', ""])
def test_ensembles(named):
    assert parse_pbtxt(ENSEMBLE.replace('platform: "ensemble"', named), "m") == parse_config(ENSEMBLE_HERE)


def test_a_decoupled_model():
    assert parse_pbtxt("model_transaction_policy { decoupled: true }", "m") == parse_config("decoupled: true")


# ---- JSON ----


def test_json_is_read_with_numbers_as_strings_too():
    text = """{"backend": "onnxruntime", "max_batch_size": "16", "input": [{"name": "x", "data_type": "TYPE_FP32",
               "dims": ["4", 2]}], "versionPolicy": {"all": {}},
               "parameters": {"intra_op_thread_count": {"string_value": "2"}}}"""
    config = parse_json(text, "m")
    assert config.max_batch_size == 16
    assert config.inputs[0].shape == (-1, 4, 2)
    assert config.versions.latest is None
    assert config.parameters == {"intra_op_threads": "2"}


def test_what_json_tells_can_be_read_again():
    config = parse_pbtxt(STATEFUL, "m")
    text = json.dumps(to_json(to_message(config, info(name="m", signature=Signature((), (), 8)))))
    assert parse_json(text, "m").sequence == config.sequence


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is no model configuration in JSON: expected an object"),
        ("[]", "is no model configuration in JSON: expected an object"),
        ("3", "is no model configuration in JSON: expected an object"),
        ("{", "is no model configuration in JSON: Failed to load JSON"),
        (
            '{"max_bach_size": 3}',
            'is no model configuration in JSON: Message type "inference.ModelConfig" has no field',
        ),
        ('{"max_batch_size": "x"}', "is no model configuration in JSON: "),
        ('{"max_batch_size": 1e99}', "is no model configuration in JSON: "),
        ('{"name": "\\ud800"}', "is no model configuration in JSON: "),
        ('{"name": "a", "name": "m"}', "is no model configuration in JSON: Failed to load JSON: "),
        ('{"name": "a"}', "name: is 'a', expected the folder's name, 'm', or none"),
        ('{"input": [{"name": "x", "data_type": 99}]}', "input[0].datatype: should be 'BOOL', "),
        ('{"input": ' + "[" * 5000, "is "),
    ],
)
def test_problems_of_json(text, problem):
    with pytest.raises(ConfigError) as caught:
        parse_json(text, "m")
    (found,) = caught.value.problems
    assert found.startswith(problem.replace("datatype", "data_type"))


def test_an_empty_file_is_all_defaults():
    assert parse_pbtxt("", "m") == ModelConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("max_batch_size: 0", None),
        (f"input {tensor()}", 0),
        (f"max_batch_size: 0 output {tensor()}", 0),
        ("max_batch_size: 4", 4),
        (f"max_batch_size: 4 input {tensor()}", 4),
    ],
)
def test_max_batch_size(text, expected):
    assert parse_pbtxt(text, "m").max_batch_size == expected


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (f"input {tensor(dims='[-1, 4]')}", (-1, 4)),
        (f"max_batch_size: 2 input {tensor(dims='[-1, 4]')}", (-1, -1, 4)),
        (f"max_batch_size: 2 input {tensor(dims='[]')}", (-1,)),
        (f"input {tensor(dims='[]')}", ()),
    ],
)
def test_dims_get_the_batch_dimension(text, shape):
    assert parse_pbtxt(text, "m").inputs[0].shape == shape


@pytest.mark.parametrize(
    ("text", "backend"),
    [
        ('backend: "onnxruntime"', "onnxruntime"),
        ('platform: "onnxruntime_onnx"', "onnxruntime"),
        ('backend: "pytorch"', "torch"),
        ('platform: "pytorch_libtorch" backend: "pytorch"', "torch"),
        ('platform: "tensorrt_plan"', "tensorrt"),
        ('backend: "python"', "python"),
        ('backend: "their_plugin"', "their_plugin"),
    ],
)
def test_backends(text, backend):
    assert parse_pbtxt(text, "m").backend == backend


@pytest.mark.parametrize(
    ("text", "instances"),
    [
        ("instance_group {}", [("cpu", 1)]),
        ("instance_group { count: 3 }", [("cpu", 3)]),
        ("instance_group { gpus: 1 }", [("gpu:1", 1)]),
        ("instance_group { kind: KIND_GPU }", [("gpu:0", 1)]),
        ('platform: "tensorrt_plan" instance_group { count: 2 }', [("gpu:0", 2)]),
    ],
)
def test_instance_groups(text, instances):
    assert [(one.device, one.count) for one in parse_pbtxt(text, "m").instances] == instances


@pytest.mark.parametrize(
    ("text", "latest", "only"),
    [
        ("version_policy { all {} }", None, None),
        ("version_policy { latest { num_versions: 2 } }", 2, None),
        ("version_policy { latest {} }", 1, None),
        ("version_policy {}", 1, None),
        ("version_policy { specific { versions: 4 } }", None, (4,)),
    ],
)
def test_version_policies(text, latest, only):
    versions = parse_pbtxt(text, "m").versions
    assert (versions.latest, versions.only) == (latest, only)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('name: "other"', "name: is 'other', expected the folder's name, 'm', or none"),
        ('backend: "python" platform: "onnxruntime_onnx"', "backend: is 'python', and platform is 'onnxruntime_onnx'"),
        (
            "sequence_batching { direct {} oldest {} }",
            'line 1, column 31: Field "oldest" is specified along with field "direct"',
        ),
        (
            "dynamic_batching {} sequence_batching {}",
            'line 1, column 21: Field "sequence_batching" is',
        ),
        (
            "sequence_batching { iterative_sequence: true }",
            "sequence_batching.iterative_sequence: is not offered yet",
        ),
        (sequence(state(use_growable_memory="true")), "sequence_batching.state[0].use_growable_memory: is not offered"),
        (
            sequence(state(data_type="TYPE_INVALID")),
            "sequence_batching.state[0].data_type: is required",
        ),
        (sequence(state(dims="[-2]")), "sequence_batching.state[0].dims[0]: should be greater than or equal to -1"),
        (sequence(state(input_name='""')), "sequence_batching.state[0].input_name: "),
        (
            sequence(initial("TYPE_FP32", "[1]", "zero_data: true")),
            "sequence_batching.state[0].initial_state.data_type: is FP32, and the state's is INT32",
        ),
        (
            sequence(initial("TYPE_INT32", "[3]", "zero_data: true")),
            "sequence_batching.state[0].initial_state.dims: is [3], expected [1]: the state's, with 1 for",
        ),
        (
            sequence(initial("TYPE_INT32", "[1]", "")),
            "sequence_batching.state[0].initial_state: has neither zero_data nor data_file",
        ),
        (
            sequence(initial("TYPE_INT32", "[1]", 'data_file: "a/b"')),
            "sequence_batching.state[0].initial_state.data_file: should be a file name without a path",
        ),
        (
            sequence('control_input { name: "S" }'),
            "sequence_batching.control_input[0].control: is given 0 times, expected once",
        ),
        (
            sequence(control("CONTROL_SEQUENCE_START", "")),
            "sequence_batching.control_input[0].control: has none of int32_false_true, fp32_false_true, bool_",
        ),
        (
            sequence(control("CONTROL_SEQUENCE_START", "int32_false_true: [0, 1] fp32_false_true: [0, 1]")),
            "sequence_batching.control_input[0].control: has int32_false_true and fp32_false_true of int32_false_true",
        ),
        (
            sequence(control("CONTROL_SEQUENCE_START", "int32_false_true: 1")),
            "sequence_batching.control_input[0]: has 1 values, expected two",
        ),
        (
            sequence(control("CONTROL_SEQUENCE_CORRID", "")),
            "sequence_batching.control_input[0].control.data_type: is required",
        ),
        (
            sequence(control("CONTROL_SEQUENCE_CORRID", "data_type: TYPE_FP64")),
            "sequence_batching.control_input[0].control.data_type: should be ",
        ),
        (
            sequence(control("CONTROL_SEQUENCE_CORRID", "data_type: TYPE_INT32 bool_false_true: [false, true]")),
            "sequence_batching.control_input[0].control.bool_false_true: is not for CONTROL_SEQUENCE_CORRID",
        ),
        (sequence(control("9", "int32_false_true: [0, 1]")), "sequence_batching.control_input[0].control.kind: is 9, "),
        (
            sequence("oldest { max_candidate_sequences: -1 }"),
            "sequence_batching.oldest.max_candidate_sequences: should be greater than or equal to 0, got -1",
        ),
        (
            f"max_batch_size: 2 {sequence('oldest { preferred_batch_size: [2, 4] }')}",
            "sequence_batching.oldest.preferred_batch_size[1]: is 4, and max_batch_size is 2",
        ),
        (
            sequence("direct { minimum_slot_utilization: 2 }"),
            "sequence_batching.direct.minimum_slot_utilization: should be less than or equal to 1, got 2.0",
        ),
        (
            "response_cache { enable: true } model_transaction_policy { decoupled: true }",
            "response_cache.enable: is set together with decoupled, and a decoupled model's responses",
        ),
        ('platform: "ensemble"', "ensemble_scheduling.step: is required where backend is ensemble"),
        ("ensemble_scheduling {}", "ensemble_scheduling.step: is required"),
        ("ensemble_scheduling { step { model_name: 'a' } }", "ensemble_scheduling.step[0].output_map: should not be"),
        (step_of("model_namespace: 'n'"), "ensemble_scheduling.step[0].model_namespace: is not offered"),
        (step_of("model_version: -2"), "ensemble_scheduling.step[0].model_version: is -2, expected a version, or -1"),
        (step_of("model_name: ''"), "ensemble_scheduling.step[0].model_name: String should have at least 1 character"),
        (f"backend: 'python' {step_of('')}", "backend: is 'python', and an ensemble has none"),
        (f"instance_group {{}} {step_of('')}", "instance_group: is not for an ensemble, whose models have their own"),
        (f"input {tensor(allow_ragged_batch='true')}", "input[0].allow_ragged_batch: is not offered yet"),
        (f"output {tensor(is_shape_tensor='true')}", "output[0].is_shape_tensor: is not offered yet"),
        ('batch_input { target_name: "x" }', "batch_input: is not offered yet"),
        ('cc_model_filenames { key: "7.5" value: "a.plan" }', "cc_model_filenames: is not offered yet; name one"),
        ("instance_group [ {}, { passive: true } ]", "instance_group[1].passive: is not offered yet"),
        ("instance_group { kind: KIND_MODEL }", "instance_group[0].kind: KIND_MODEL is not offered yet"),
        ("instance_group { kind: KIND_CPU gpus: 0 }", "instance_group[0].gpus: should be empty for KIND_CPU, got [0]"),
        ("instance_group { count: -1 }", "instance_group[0].count: should be greater than or equal to 1, got -1"),
        (
            "dynamic_batching { preserve_ordering: true default_queue_policy { timeout_action: DELAY } }",
            "dynamic_batching.default_queue_policy.timeout_action: is delay, and with preserve_order nothing overtakes",
        ),
        (
            "dynamic_batching { preserve_ordering: true priority_levels: 2 }",
            "dynamic_batching.priority_levels: is 2, and with preserve_order nothing overtakes: expected 0",
        ),
        (
            "dynamic_batching { priority_levels: 2 priority_queue_policy { key: 3 value {} } }",
            "dynamic_batching.priority_queue_policy[3]: is above priority_levels, which is 2",
        ),
        (
            "dynamic_batching { priority_levels: 2 priority_queue_policy { key: 0 value {} } }",
            "dynamic_batching.priority_queue_policy[0]: is no level; expected 1",
        ),
        (
            "dynamic_batching { priority_levels: 5 default_priority_level: 6 }",
            "dynamic_batching.default_priority_level: is 6, and priority_levels is 5: expected no more",
        ),
        (
            f"dynamic_batching {{ priority_levels: 1 priority_queue_policy {{ key: 1 value {{ {TOO_LONG} }} }} }}",
            "dynamic_batching.priority_queue_policy[1].default_timeout_microseconds: should be less than",
        ),
        (
            "instance_group { rate_limiter { resources { name: '' count: 1 } } }",
            "instance_group[0].rate_limiter.resources: ",
        ),
        (
            "max_batch_size: 2 dynamic_batching { preferred_batch_size: [2, 4] }",
            "dynamic_batching.preferred_batch_size[1]: is 4, and max_batch_size is 2",
        ),
        (
            "dynamic_batching { default_queue_policy { default_timeout_microseconds: 18446744073709551615 } }",
            "dynamic_batching.default_queue_policy.default_timeout_microseconds: should be less than",
        ),
        (
            f"input {tensor(reshape='{ shape: [3, 2] }')}",
            "input[0]: cannot be reshaped from [4] to [3, 2]",
        ),
        (f"output {tensor(reshape='{ }')}", "output[0]: cannot be reshaped from [4] to []"),
        (f"input {tensor(data_type='TYPE_INVALID')}", "input[0].data_type: is required"),
        (f"input {tensor(dims='[1, -5]')}", "input[0].dims[1]: should be greater than or equal to -1, got -5"),
        (
            f"max_batch_size: 2 input {tensor(dims='[1, -5]')}",
            "input[0].dims[1]: should be greater than or equal to -1, got -5",
        ),
        (f"input [ {tensor()}, {tensor()} ]", "input[1].name: 'x' is already the name of the one at [0]"),
        ("input { data_type: TYPE_FP32 }", "input[0].name: "),
        (f"output {tensor(label_filename=repr('a/b'))}", "output[0].label_filename: should be a file name"),
        ("version_policy { specific { versions: [1, -1] } }", "version_policy.specific.versions[1]: should be greater"),
        ('default_model_filename: "../x"', "default_model_filename: should be a file name without a path"),
        ("max_batch_size: -1", "max_batch_size: should be greater than or equal to 0, got -1"),
        ("max_batch: 1", "line 1, column 1: "),
        ('name: "m"\nplatform: onnx', "line 2, column 11: "),
        ("input [", "line 1, column 8: "),
        ('name: "a" name: "b"', "line 1, column 17: "),
    ],
)
def test_one_problem(text, problem):
    (found,) = problems_of(text)
    assert found.startswith(problem)


def test_all_problems_at_once():
    text = f'name: "n" max_batch_size: -1 batch_input {{}} input {tensor(allow_ragged_batch="true", dims="-7")}'
    assert [problem.partition(": ")[0] for problem in problems_of(text)] == [
        "name",
        "input[0].allow_ragged_batch",
        "batch_input",
        "max_batch_size",
        "input[0].dims[0]",
    ]


@pytest.mark.parametrize(
    "text",
    [
        'name: "\\377"',
        "input {" * 5000,
        "\0",
        "max_batch_size: 99999999999",
        "[type.googleapis.com/x] {}",
        "input <",
        "\ufeff",
    ],
)
def test_broken_text_is_told_as_a_problem(text):
    assert len(problems_of(text)) == 1


USED = {
    "name", "platform", "backend", "version_policy", "max_batch_size", "input", "output", "dynamic_batching",
    "instance_group", "default_model_filename", "parameters", "sequence_batching", "ensemble_scheduling",
    "model_transaction_policy", "response_cache",
}  # fmt: skip


def test_no_field_is_passed_over_by_oversight():
    refused = {path.partition(".")[0] for path in REFUSED}
    assert {field.name for field in pb.ModelConfig.DESCRIPTOR.fields} == USED | IGNORED | refused


@pytest.mark.parametrize("path", REFUSED)
def test_every_refused_path_exists(path):
    descriptor = pb.ModelConfig.DESCRIPTOR
    *above, last = path.split(".")
    for name in above:
        descriptor = descriptor.fields_by_name[name].message_type
    assert last in descriptor.fields_by_name


BATCHING = Signature(
    (TensorSpec("x", DataType.FP32, (-1, 784)), TensorSpec("m", DataType.BYTES, (-1,), True)),
    (TensorSpec("y", DataType.BF16, (-1, 10)),),
    8,
)


def info(signature=BATCHING, name="digits"):
    return ModelInfo(name, "1", "onnxruntime_onnx", "onnxruntime", signature)


def test_message_tells_what_is_served():
    config = parse_config("""
outputs: [{name: y, datatype: BF16, shape: [-1, 10], labels: labels.txt}]
instances:
- {device: "gpu:1", count: 2}
- {device: cpu}
- {device: "gpu:MIG-5a3c1f00-0b1d-4f5e-9c7a-0123456789ab"}
batching: {preferred_sizes: [4], max_queue_delay_us: 5, priority_levels: 3}
parameters: {threads: 2, fast: true}
versions: {latest: 2}
""")
    message = to_message(config, info())
    assert (message.name, message.platform, message.backend) == ("digits", "onnxruntime_onnx", "onnxruntime")
    assert message.max_batch_size == 8
    assert [(one.name, list(one.dims), one.optional) for one in message.input] == [("x", [784], False), ("m", [], True)]
    assert [one.data_type for one in message.input] == [pb.DataType.TYPE_FP32, pb.DataType.TYPE_STRING]
    assert [(list(one.dims), one.label_filename) for one in message.output] == [([10], "labels.txt")]
    assert [(one.name, one.kind, one.count, list(one.gpus)) for one in message.instance_group] == [
        ("digits_0", pb.ModelInstanceGroup.KIND_GPU, 2, [1]),
        ("digits_1", pb.ModelInstanceGroup.KIND_CPU, 1, []),
        ("digits_2", pb.ModelInstanceGroup.KIND_GPU, 1, []),
    ]
    assert message.version_policy.latest.num_versions == 2
    assert message.default_model_filename == "model.onnx"
    assert {key: one.string_value for key, one in message.parameters.items()} == {"threads": "2", "fast": "true"}
    assert list(message.dynamic_batching.preferred_batch_size) == [4]
    assert message.dynamic_batching.default_priority_level == 2


def test_message_tells_of_levels_and_of_what_instances_share():
    config = parse_config("""
instances:
- {device: cpu, rate_limit: {resources: {R1: 4}, global_resources: {R2: 1}, priority: 3}}
- {device: "gpu:0"}
batching:
  priority_levels: 3
  default_priority: 3
  default_timeout_us: 70
  priorities: {1: {timeout_action: delay, max_queue_size: 5}, 2: {allow_timeout_override: false}}
""")
    message = to_message(config, info())
    batching = message.dynamic_batching
    assert (batching.priority_levels, batching.default_priority_level) == (3, 3)
    shown = {
        level: (one.timeout_action, one.default_timeout_microseconds, one.allow_timeout_override, one.max_queue_size)
        for level, one in {0: batching.default_queue_policy, **batching.priority_queue_policy}.items()
    }
    reject, delay = pb.ModelQueuePolicy.REJECT, pb.ModelQueuePolicy.DELAY
    assert shown == {0: (reject, 70, True, 1024), 1: (delay, 70, True, 5), 2: (reject, 70, False, 1024)}
    limiter = message.instance_group[0].rate_limiter
    assert [(one.name, getattr(one, "global"), one.count) for one in limiter.resources] == [
        ("R1", False, 4),
        ("R2", True, 1),
    ]
    assert limiter.priority == 3
    assert not message.instance_group[1].HasField("rate_limiter")


def test_a_policy_that_is_given_counts_as_it_is_written():
    """Where Triton's form says nothing of a policy, a request's own timeout counts; where it has one, as it says."""
    assert parse_pbtxt("dynamic_batching {}", "m").batching.allow_timeout_override
    given = parse_pbtxt("dynamic_batching { default_queue_policy { max_queue_size: 3 } }", "m").batching
    assert not given.allow_timeout_override
    assert given.max_queue_size == 3


def test_message_of_a_model_that_does_not_batch():
    signature = Signature((TensorSpec("x", DataType.INT8, (3, -1)),), (TensorSpec("y", DataType.INT8, None),))
    message = to_message(parse_config("versions: all\nmodel_file: net.onnx"), info(signature))
    assert not message.HasField("dynamic_batching")
    assert list(message.input[0].dims) == [3, -1]
    assert list(message.output[0].dims) == [-1]
    assert message.version_policy.WhichOneof("policy_choice") == "all"
    assert message.default_model_filename == "net.onnx"


def test_what_is_told_can_be_read_again():
    config = parse_pbtxt(RESNET, "resnet")
    signature = Signature(
        tuple(one.spec() for one in config.inputs), tuple(one.spec() for one in config.outputs), config.max_batch_size
    )
    assert from_message(to_message(config, info(signature, "resnet")), "resnet") == config


def told(text, folder_name="m"):
    """What is told of a model whose file agrees with its configuration."""
    config = parse_pbtxt(text, folder_name)
    signature = Signature(
        tuple(one.spec() for one in config.inputs),
        tuple(one.spec() for one in config.outputs),
        config.max_batch_size or 0,
        config.decoupled,
    )
    backend = config.backend or "onnxruntime"
    return config, to_message(config, ModelInfo(folder_name, "1", backend, backend, signature))


@pytest.mark.parametrize(
    "text",
    [
        STATEFUL,
        STATEFUL.replace("4 preferred", "0 preferred"),
        f"max_batch_size: 2 {sequence('direct { max_queue_delay_microseconds: 5 minimum_slot_utilization: 0.25 }')}",
        ENSEMBLE,
        "max_batch_size: 1 model_transaction_policy { decoupled: true }",
        "max_batch_size: 1 response_cache { enable: true }",
    ],
)
def test_what_is_told_of_the_new_kinds_can_be_read_again(text):
    config, message = told(text)
    again = from_message(message, "m")
    expected = config.model_copy(update={"backend": again.backend, "model_file": again.model_file})
    assert again == expected


def test_sequences_are_told_as_triton_does():
    _, message = told(STATEFUL)
    assert message.WhichOneof("scheduling_choice") == "sequence_batching"
    plain = to_json(message)["sequence_batching"]
    assert plain["max_sequence_idle_microseconds"] == 5000000
    assert plain["oldest"]["max_candidate_sequences"] == 4
    assert plain["control_input"][3]["control"][0]["kind"] == "CONTROL_SEQUENCE_CORRID"
    assert plain["state"][0]["dims"] == [-1]
    assert plain["state"][0]["initial_state"][0]["zero_data"] is True
    assert plain["state"][1]["initial_state"][0]["data_file"] == "begin"


def test_an_ensemble_is_told_as_triton_does():
    _, message = told(ENSEMBLE)
    plain = to_json(message)
    assert (plain["platform"], plain["backend"]) == ("ensemble", "")
    assert plain["instance_group"] == []
    assert plain["ensemble_scheduling"]["step"][0]["model_version"] == -1
    assert plain["ensemble_scheduling"]["step"][1]["output_map"] == {"y": "class"}
    assert "dynamic_batching" not in plain
    assert plain["response_cache"] == {"enable": True}


def test_a_signature_tells_that_a_model_is_decoupled():
    signature = Signature((), (), 0, decoupled=True)
    assert to_message(parse_config(""), info(signature)).model_transaction_policy.decoupled


def test_json_is_tritons():
    config = parse_config("batching: {max_queue_delay_us: 5000000000}\nversions: {only: [2, 9000000000]}")
    plain = to_json(to_message(config, info()))
    assert plain["name"] == "digits"
    assert plain["max_batch_size"] == 8
    assert plain["version_policy"] == {"specific": {"versions": [2, 9000000000]}}
    assert plain["input"][0] == {
        "name": "x",
        "data_type": "TYPE_FP32",
        "format": "FORMAT_NONE",
        "dims": [784],
        "is_shape_tensor": False,
        "allow_ragged_batch": False,
        "optional": False,
        "is_non_linear_format_io": False,
    }
    assert plain["dynamic_batching"]["max_queue_delay_microseconds"] == 5000000000
    assert plain["dynamic_batching"]["default_queue_policy"]["default_timeout_microseconds"] == 0
    assert plain["instance_group"][0]["kind"] == "KIND_CPU"
    assert plain["runtime"] == ""
    assert plain["metric_tags"] == {}
    assert plain["batch_input"] == []
    assert "sequence_batching" not in plain
    assert "optimization" not in plain
    json.dumps(plain)


def test_json_of_statistics_has_numbers():
    statistics = pb.ModelStatistics(name="m", inference_count=3)
    statistics.inference_stats.success.count = 1 << 60
    statistics.response_stats["0"].success.ns = 5
    plain = to_json(statistics)
    assert plain["inference_count"] == 3
    assert plain["last_inference"] == 0
    assert plain["inference_stats"]["success"] == {"count": 1 << 60, "ns": 0}
    assert plain["response_stats"]["0"]["success"] == {"count": 0, "ns": 5}


def test_json_of_maps_by_number():
    batching = pb.ModelDynamicBatching()
    batching.priority_queue_policy[3].default_timeout_microseconds = 4
    assert to_json(batching)["priority_queue_policy"]["3"]["default_timeout_microseconds"] == 4


@pytest.mark.parametrize(
    ("backend", "kept"),
    [
        ("onnxruntime", {"intra_op_threads": "3"}),
        ("pytorch", {"intra_op_threads": "3"}),
        ("python", {"intra_op_thread_count": "3", "execution_mode": "1", "my_tag": "x"}),
    ],
)
def test_tritons_own_parameters_tune_tritons_runtimes_and_do_not_stop_a_model(backend, kept):
    text = f'backend: "{backend}"' + "".join(
        f' parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        for key, value in (("intra_op_thread_count", "3"), ("execution_mode", "1"), ("my_tag", "x"))
    )
    assert parse_pbtxt(text, "m").parameters == kept


def test_tritons_pytorch_has_its_threads_in_capitals():
    text = 'platform: "pytorch_libtorch"' + "".join(
        f' parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        for key, value in (("INTRA_OP_THREAD_COUNT", "3"), ("INTER_OP_THREAD_COUNT", "2"), ("INFERENCE_MODE", "true"))
    )
    assert parse_pbtxt(text, "m").parameters == {"intra_op_threads": "3"}


def test_tritons_openvino_parameters():
    text = 'backend: "openvino"' + "".join(
        f' parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        for key, value in (("INFERENCE_NUM_THREADS", "3"), ("PERFORMANCE_HINT", "LATENCY"), ("precision", "bf16"))
    )
    assert parse_pbtxt(text, "m").parameters == {"intra_op_threads": "3", "precision": "bf16"}


def test_tritons_tensorflow_names():
    text = 'platform: "tensorflow_savedmodel"' + "".join(
        f' parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        for key, value in (
            ("TF_NUM_INTRA_THREADS", "2"),
            ("TF_USE_PER_SESSION_THREADS", "true"),
            ("TF_SIGNATURE_DEF", "minus"),
            ("TF_GRAPH_TAG", "serve"),
        )
    )
    config = parse_pbtxt(text, "m")
    assert config.backend == "tensorflow"
    assert config.parameters == {"intra_op_threads": "2", "signature": "minus", "tag": "serve"}
    assert parse_pbtxt('backend: "tensorflow"', "m").backend == "tensorflow"
    none = 'backend: "tensorflow" parameters { key: "TF_NUM_INTRA_THREADS" value { string_value: "0" } }'
    assert parse_pbtxt(none, "m").parameters == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('backend: "fil"', "backend: 'fil' is Triton's for tree models; set backend: xgboost for a model of XGBoost"),
        ('platform: "tensorflow_graphdef"', "platform: 'tensorflow_graphdef' is not offered: save the graph as"),
    ],
)
def test_what_to_do_instead_of_tritons_other_backends(text, problem):
    with pytest.raises(ConfigError) as caught:
        parse_pbtxt(text, "m")
    assert [one.startswith(problem) for one in caught.value.problems] == [True]


VALUES = {
    FieldDescriptor.CPPTYPE_BOOL: [True],
    FieldDescriptor.CPPTYPE_STRING: ["", "a", "b", "../c", "ensemble", "TYPE_FP32", "0"],
    FieldDescriptor.CPPTYPE_FLOAT: [0.0, 0.5, 3e38, float("nan"), float("inf"), -1.0],
    FieldDescriptor.CPPTYPE_DOUBLE: [0.0, 0.5, float("nan")],
    FieldDescriptor.CPPTYPE_INT32: [0, 1, 2, -1, 2**31 - 1, -(2**31)],
    FieldDescriptor.CPPTYPE_INT64: [0, 1, 2, -1, 2**63 - 1, -(2**63)],
    FieldDescriptor.CPPTYPE_UINT32: [0, 1, 2**32 - 1],
    FieldDescriptor.CPPTYPE_UINT64: [0, 1, 2**63, 2**64 - 1],
    FieldDescriptor.CPPTYPE_ENUM: [0, 1, 2, 3, 8, 13, 99],
}


def fill(message, random, fields=6):
    """Any values in some of a message's fields, those of messages in it too."""
    known = list(message.DESCRIPTOR.fields)
    for field in random.sample(known, min(fields, len(known))):
        held = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is None:
                held["k"] = "v"
        elif field.message_type is not None and hasattr(held, "add"):
            for _ in range(random.randint(0, 2)):
                fill(held.add(), random)
        elif field.message_type is not None:
            held.SetInParent()
            fill(held, random)
        elif hasattr(held, "append"):
            held.extend(random.choices(VALUES[field.cpp_type], k=random.randint(0, 3)))
        else:
            setattr(message, field.name, random.choice(VALUES[field.cpp_type]))


@given(st.randoms(use_true_random=False), st.booleans())
def test_whatever_is_set_gives_a_configuration_or_problems(random, whole):
    message = pb.ModelConfig()
    fill(message, random, fields=99 if whole else 6)
    try:
        config = from_message(message, "m")
    except ConfigError:
        return
    inputs, outputs = ([one.spec() for one in side] for side in (config.inputs, config.outputs))
    signature = Signature(tuple(inputs), tuple(outputs), config.max_batch_size or 0)
    told_again = to_message(config, ModelInfo("m", "1", "fake", "fake", signature))
    assert to_json(told_again)["name"] == "m"


def test_a_reshape_and_a_format_are_read_and_given_back():
    config = parse_pbtxt(
        'max_batch_size: 4 input { name: "x" data_type: TYPE_FP32 dims: [3, 4] '
        "format: FORMAT_NHWC reshape { shape: [12] } }"
        ' output { name: "y" data_type: TYPE_FP32 dims: [1] reshape { shape: [] } }',
        "m",
    )
    (x,), (y,) = config.inputs, config.outputs
    assert (x.shape, x.reshape, x.format) == ((-1, 3, 4), (-1, 12), "NHWC")
    assert (y.shape, y.reshape) == ((-1, 1), (-1,))
    signature = Signature((x.spec(),), (y.spec(),), 4)
    told = to_json(to_message(config, ModelInfo("m", "1", "p", "b", signature)))
    assert told["input"][0]["format"] == "FORMAT_NHWC"
    assert told["input"][0]["reshape"] == {"shape": [12]}
    assert told["output"][0]["reshape"] == {"shape": []}
