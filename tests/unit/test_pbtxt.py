"""config.pbtxt in, Triton's configuration message and its JSON out."""

import json

import pytest

from headrace.core.model import ModelInfo, Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace.repository.model_config import ConfigError, ModelConfig, parse_config
from headrace.repository.pbtxt import IGNORED, REFUSED, from_message, parse_pbtxt, to_json, to_message
from headrace.wire import pb

RESNET = """
name: "resnet"
platform: "onnxruntime_onnx"
max_batch_size: 16
input [ { name: "data" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, 224, 224 ] } ]
input { name: "mask" data_type: TYPE_BOOL dims: -1 optional: true }
output [ { name: "prob" data_type: TYPE_STRING dims: [ 1000 ] reshape { shape: [ 1000 ] }
           label_filename: "labels.txt" } ]
instance_group [ { count: 2 kind: KIND_GPU gpus: [ 0, 3 ] }, { kind: KIND_CPU } ]
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 100
  preserve_ordering: true
  priority_levels: 4
  default_priority_level: 2
  default_queue_policy { default_timeout_microseconds: 7 max_queue_size: 64 allow_timeout_override: true }
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


def test_a_whole_file():
    config = parse_pbtxt(RESNET, "resnet")
    assert config == parse_config("""
backend: onnxruntime
max_batch_size: 16
inputs:
- {name: data, datatype: FP32, shape: [-1, 3, 224, 224]}
- {name: mask, datatype: BOOL, shape: [-1, -1], optional: true}
outputs: [{name: prob, datatype: BYTES, shape: [-1, 1000], labels: labels.txt}]
instances: [{device: "gpu:0", count: 2}, {device: "gpu:3", count: 2}, {device: cpu}]
batching: {preferred_sizes: [4, 8], max_queue_delay_us: 100, preserve_order: true, priority_levels: 4,
           default_timeout_us: 7, max_queue_size: 64}
versions: {only: [1, 3]}
model_file: net.onnx
parameters: {intra_op_threads: "2"}
""")


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
        ("ensemble_scheduling { step { } }", "ensemble_scheduling: is not offered yet"),
        ("sequence_batching {}", "sequence_batching: is not offered yet"),
        ("model_transaction_policy { decoupled: true }", "model_transaction_policy.decoupled: is not offered yet"),
        ("response_cache { enable: true }", "response_cache.enable: is not offered yet"),
        (f"input {tensor(allow_ragged_batch='true')}", "input[0].allow_ragged_batch: is not offered yet"),
        (f"output {tensor(is_shape_tensor='true')}", "output[0].is_shape_tensor: is not offered yet"),
        ('batch_input { target_name: "x" }', "batch_input: is not offered yet"),
        ('cc_model_filenames { key: "7.5" value: "a.plan" }', "cc_model_filenames: is not offered yet; name one"),
        ("instance_group [ {}, { passive: true } ]", "instance_group[1].passive: is not offered yet"),
        ("instance_group { kind: KIND_MODEL }", "instance_group[0].kind: KIND_MODEL is not offered yet"),
        ("instance_group { kind: KIND_CPU gpus: 0 }", "instance_group[0].gpus: should be empty for KIND_CPU, got [0]"),
        ("instance_group { count: -1 }", "instance_group[0].count: should be greater than or equal to 1, got -1"),
        (
            "dynamic_batching { default_queue_policy { timeout_action: DELAY } }",
            "dynamic_batching.default_queue_policy.timeout_action: is DELAY, which is not offered yet",
        ),
        (
            "dynamic_batching { priority_levels: 2 priority_queue_policy { key: 1 value {} } }",
            "dynamic_batching.priority_queue_policy: is not offered yet",
        ),
        (
            "dynamic_batching { priority_levels: 5 default_priority_level: 1 }",
            "dynamic_batching.default_priority_level: is 1, which is not offered yet; expected 3",
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
            f"input {tensor(reshape='{ shape: [2, 2] }')}",
            "input[0].reshape: to [2, 2] from [4] is not offered yet",
        ),
        (f"output {tensor(reshape='{ }')}", "output[0].reshape: to [] from [4] is not offered yet"),
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
    text = f'name: "n" max_batch_size: -1 sequence_batching {{}} input {tensor(allow_ragged_batch="true", dims="-7")}'
    assert [problem.partition(": ")[0] for problem in problems_of(text)] == [
        "name",
        "input[0].allow_ragged_batch",
        "sequence_batching",
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
    "instance_group", "default_model_filename", "parameters",
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
instances: [{device: "gpu:1", count: 2}, {device: cpu}]
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
    ]
    assert message.version_policy.latest.num_versions == 2
    assert message.default_model_filename == "model.onnx"
    assert {key: one.string_value for key, one in message.parameters.items()} == {"threads": "2", "fast": "true"}
    assert list(message.dynamic_batching.preferred_batch_size) == [4]
    assert message.dynamic_batching.default_priority_level == 2


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
