"""config.yaml: what it may say, and every problem of one that says something else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.queue_policy import QueuePolicy
from headrace.core.ensemble import Step
from headrace.core.errors import InvalidRequest, Kind
from headrace.core.model import TensorSpec
from headrace.core.sequence import ControlSpec, SequenceSpec, StateSpec
from headrace.core.tensor import DataType
from headrace.repository.model_config import ConfigError, ModelConfig, build_config, parse_config
from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.form import Technique

EVERYTHING = """
backend: onnxruntime
max_batch_size: 32
inputs: [{name: x, datatype: FP32, shape: [-1, 784], optional: true}]
outputs: [{name: y, datatype: BYTES, shape: [-1, 10], labels: labels.txt}]
batching: {max_queue_delay_us: 500, preferred_sizes: [8, 16], max_queue_size: 64,
           default_timeout_us: 9, priority_levels: 1, default_priority: 1, timeout_action: reject,
           allow_timeout_override: false, preserve_order: true, refuse_late: false,
           priorities: {1: {max_queue_size: 7, default_timeout_us: 8, timeout_action: reject,
                            allow_timeout_override: true}}}
instances: [{device: cpu, count: 2}, {device: "gpu:0", rate_limit: {resources: {R: 1}, priority: 2}}]
cpu_weight: 2.0
versions: {only: [1, 3]}
warmup: false
parameters: {intra_op_threads: 1, ratio: 0.5, mode: fast, quiet: true}
optimize:
  budget: {metric: top1_agreement, min: 0.99}
  calibration: calibration.npz
  allow: [bf16, int8_static]
  objective: {p99_ms: 20}
model_file: net.onnx
execution_timeout_s: 2.5
memory_limit_bytes: 6000000000
residency: {pinned: true}
decoupled: true
sequence:
  strategy: oldest
  max_idle_us: 5000
  max_candidates: 7
  controls:
  - {input: START, kind: start, datatype: INT32, values: [2, 3]}
  - {input: END, kind: end, datatype: BOOL, values: [false, true]}
  - {input: READY, kind: ready, datatype: FP32}
  - {input: CORRID, kind: correlation_id, datatype: BYTES}
  states: [{input: s, output: t, datatype: FP32, shape: [4], initial: initial.bin},
           {input: u, output: v, datatype: INT64, shape: [-1, 2]}]
"""

ENSEMBLE = """
ensemble:
- {model: decode, version: 2, inputs: {raw: image}, outputs: {pixels: pixels}}
- {model: classify, inputs: {x: pixels}, outputs: {y: class}}
response_cache: true
"""


def problems_of(text):
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert caught.value.kind is Kind.INVALID
    assert str(caught.value) == "; ".join(caught.value.problems)
    return caught.value.problems


BUDGET_METRICS = ("max_abs", "max_rel", "cosine", "mean_cosine", "top1_agreement", "topk_agreement", "module.one:score")

OPTIMIZE = """
optimize:
  budget: {metric: "metrics/own.py:score", min: 0.9}
  calibration: examples
  allow: [tf32, bf16, fp16, int8_dynamic, int8_static, prune, sparse, distill, qat]
  objective: {p99_ms: 20}
  training: train.py
  time_limit_s: 60.0
"""


def test_what_the_optimiser_may_do_is_read():
    config = parse_config(OPTIMIZE).optimize
    assert config is not None
    assert config.budget is not None
    assert config.budget.budget() == Budget("metrics/own.py:score", min=0.9)
    assert config.budget.budget().is_own
    assert config.allow == tuple(Technique)
    assert str(config.objective) == "throughput with p99 of at most 20 ms"
    assert config.time_limit_s == 60
    assert config.named_files() == {
        "optimize.calibration": "examples",
        "optimize.training": "train.py",
        "optimize.budget.metric": "metrics/own.py",
    }
    for metric in BUDGET_METRICS:
        bound = "max: 0.1" if metric in ("max_abs", "max_rel") else "min: 0.9"
        assert parse_config(f"optimize: {{budget: {{metric: {metric}, {bound}}}}}").optimize


def test_files_that_the_optimiser_would_miss_are_told(tmp_path):
    config = parse_config(OPTIMIZE).optimize
    assert config is not None
    (tmp_path / "examples").mkdir()
    (tmp_path / "train.py").mkdir()
    assert config.problems(tmp_path) == [
        "optimize.training: 'train.py' is a folder, expected a Python file",
        f"optimize.budget.metric: 'metrics/own.py' is not in {tmp_path}",
    ]


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "{}"])
def test_an_empty_file_is_all_defaults(text):
    config = parse_config(text)
    assert config == ModelConfig()
    assert config.backend is None
    assert config.max_batch_size is None
    assert config.batching.max_queue_size == 1024
    assert [(one.device, one.count) for one in config.instances] == [("cpu", 1)]
    assert config.versions.latest == 1
    assert config.warmup
    assert config.execution_timeout_s == 300


def test_everything_is_read():
    config = parse_config(EVERYTHING)
    assert config.inputs[0].spec() == TensorSpec("x", DataType.FP32, (-1, 784), True)
    assert config.outputs[0].spec() == TensorSpec("y", DataType.BYTES, (-1, 10))
    assert config.outputs[0].labels == "labels.txt"
    assert config.batching.preferred_sizes == (8, 16)
    assert config.batching.preserve_order
    assert config.batching.policy() == QueuePolicy(64, 9, delays=False, allow_timeout_override=False)
    assert config.batching.level_policies() == {1: QueuePolicy(7, 8, delays=False, allow_timeout_override=True)}
    assert not config.batching.refuse_late
    assert config.instances[1].rate_limit.resources == {"R": 1}
    assert config.cpu_weight == 2
    assert [(one.device, one.count) for one in config.instances] == [("cpu", 2), ("gpu:0", 1)]
    assert (config.versions.latest, config.versions.only) == (None, (1, 3))
    assert config.parameters == {"intra_op_threads": 1, "ratio": 0.5, "mode": "fast", "quiet": True}
    assert config.optimize is not None
    assert config.optimize.objective.p99_ms == 20
    assert config.model_file == "net.onnx"
    assert config.execution_timeout_s == 2.5
    assert config.memory_limit_bytes == 6_000_000_000
    assert config.residency.pinned
    assert config.decoupled
    assert not config.response_cache
    assert config.sequence is not None
    assert config.sequence.spec({"initial.bin": b"16 bytes of state"}) == SequenceSpec(
        "oldest",
        5000,
        7,
        0.0,
        (
            ControlSpec("START", "start", DataType.INT32, (2.0, 3.0)),
            ControlSpec("END", "end", DataType.BOOL, (0.0, 1.0)),
            ControlSpec("READY", "ready", DataType.FP32, (0.0, 1.0)),
            ControlSpec("CORRID", "correlation_id", DataType.BYTES),
        ),
        (
            StateSpec("s", "t", DataType.FP32, (4,), b"16 bytes of state"),
            StateSpec("u", "v", DataType.INT64, (-1, 2)),
        ),
    )


def test_an_ensemble_is_read():
    config = parse_config(ENSEMBLE)
    assert [step.step() for step in config.ensemble] == [
        Step("decode", "2", {"raw": "image"}, {"pixels": "pixels"}),
        Step("classify", "", {"x": "pixels"}, {"y": "class"}),
    ]
    assert config.response_cache
    assert parse_config(f"backend: ensemble\n{ENSEMBLE}").ensemble == config.ensemble


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "problem"),
    [
        ("FP32", "[4]", bytes(16), ""),
        ("FP32", "[-1, 2]", bytes(8), ""),
        ("FP32", "[]", bytes(4), ""),
        ("FP32", "[4]", bytes(15), "has 15 bytes, expected 16 for FP32[4]"),
        ("FP32", "[-1, 2]", bytes(16), "has 16 bytes, expected 8 for FP32[1, 2]"),
        ("BYTES", "[2]", b"\1\0\0\0a\0\0\0\0", ""),
        ("BYTES", "[2]", b"\1\0\0\0a", "has 5 bytes of BYTES data, too few"),
    ],
)
def test_what_a_state_may_begin_with(datatype, shape, data, problem):
    text = f"sequence: {{states: [{{input: a, output: b, datatype: {datatype}, shape: {shape}, initial: f}}]}}"
    state = parse_config(text).sequence.states[0]
    if problem:
        with pytest.raises(InvalidRequest) as caught:
            state.check_initial(data)
        assert str(caught.value).startswith(problem)
    else:
        state.check_initial(data)


@pytest.mark.parametrize(
    ("text", "latest", "only"),
    [("all", None, None), ("{latest: 3}", 3, None), ("{only: [7]}", None, (7,))],
)
def test_versions(text, latest, only):
    versions = parse_config(f"versions: {text}").versions
    assert (versions.latest, versions.only) == (latest, only)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("max_bach_size: 3", "max_bach_size: unknown key; did you mean max_batch_size?"),
        ("batching: {preferd_sizes: []}", "batching.preferd_sizes: unknown key; did you mean preferred_sizes?"),
        ("inputs: [{name: x, datatype: FP32, shape: [], dtype: 1}]", "inputs[0].dtype: unknown key; did you mean "),
        ("versions: {lastest: 1}", "versions.lastest: unknown key; did you mean latest?"),
        ("optimize: {budget: {metric: max_abs, max: 1, mn: 0}}", "optimize.budget.mn: unknown key; did you mean min?"),
        ("zzz: 1", "zzz: unknown key; known are backend, max_batch_size, "),
        ("max_batch_size: true", "max_batch_size: should be a valid integer, got True"),
        ('max_batch_size: "8"', "max_batch_size: should be a valid integer, got '8'"),
        ("max_batch_size: -1", "max_batch_size: should be greater than or equal to 0, got -1"),
        ("max_batch_size: 2147483648", "max_batch_size: should be less than or equal to 2147483647"),
        ("batching:", "batching: should be a mapping, got None"),
        ("inputs: {name: x}", "inputs: should be a list, got {'name': 'x'}"),
        ("inputs: [x]", "inputs[0]: should be a mapping, got 'x'"),
        ("inputs: [{name: x, shape: [1]}]", "inputs[0].datatype: is required"),
        ("inputs: [{name: x, datatype: float, shape: [1]}]", "inputs[0].datatype: should be 'BOOL', 'UINT8', "),
        ("inputs: [{name: x, datatype: FP32, shape: [1, -2]}]", "inputs[0].shape[1]: should be greater than or equal"),
        ("batching: {max_queue_size: 0}", "batching.max_queue_size: should be greater than or equal to 1, got 0"),
        ("batching: {preferred_sizes: [1, 0]}", "batching.preferred_sizes[1]: should be greater than or equal to 1"),
        ("instances: [{count: 0}]", "instances[0].count: should be greater than or equal to 1, got 0"),
        ("instances: [{device: gpu}]", "instances[0].device: should be 'cpu', 'gpu:N' or 'gpu:UUID' with a whole UUID"),
        ("instances: [{device: 'gpu:01'}]", "instances[0].device: should be 'cpu', 'gpu:N' or 'gpu:UUID'"),
        ("instances: [{device: 'gpu:GPU-5a'}]", "instances[0].device: should be 'cpu', 'gpu:N' or 'gpu:UUID'"),
        ("instances: []", "instances: should not be empty"),
        ("versions: newest", "versions: should be all, {latest: N} or {only: [N, ...]}, got 'newest'"),
        ("versions: {latest: 1, only: [1]}", "versions: should be all, {latest: N} or {only: [N, ...]}, got "),
        ("versions: {}", "versions: should be all, {latest: N} or {only: [N, ...]}, got {}"),
        ("versions: {only: [0]}", "versions.only[0]: should be greater than or equal to 1, got 0"),
        ("versions: {only: []}", "versions.only: should not be empty"),
        ("warmup: 1", "warmup: should be a valid boolean, got 1"),
        ("parameters: {a: [1]}", "parameters.a: should be a string, a number or a boolean, got [1]"),
        ("parameters: {3: 4}", "parameters: keys should be strings, got 3"),
        ("model_file: 1/model.onnx", "model_file: should be a file name without a path, got '1/model.onnx'"),
        ("model_file: ..", "model_file: should be a file name without a path, got '..'"),
        ("execution_timeout_s: -1", "execution_timeout_s: should be greater than or equal to 0, got -1"),
        ("memory_limit_bytes: -1", "memory_limit_bytes: should be greater than or equal to 0, got -1"),
        ("residency: {pin: true}", "residency.pin: unknown key; did you mean pinned?"),
        ("residency: true", "residency: should be a mapping, got True"),
        ("memory_limit_bytes: 4GB", "memory_limit_bytes: should be a valid integer, got '4GB'"),
        ("execution_timeout_s: .inf", "execution_timeout_s: should be a finite number, got inf"),
        ("execution_timeout_s: true", "execution_timeout_s: should be a valid number, got True"),
        ("optimize: {allow: [bf16]}", "optimize: allows what changes answers (bf16), so it needs a budget, "),
        ("optimize: {allow: [fp3]}", "optimize.allow[0]: should be 'tf32', 'bf16', "),
        ("optimize: {budget: {metric: cosine}}", "optimize.budget: should have either min or max"),
        ("optimize: {budget: {metric: cosine, max: 1}}", "optimize.budget: should have a min of at most 1"),
        ("optimize: {budget: {metric: max_abs, min: 1}}", "optimize.budget: should have a max of at least 0"),
        ("optimize: {budget: {metric: accuracy, min: 1}}", "optimize.budget: metric should be max_abs, max_rel, "),
        ("optimize: {budget: {metric: max_rel, min: 1}}", "optimize.budget: should have a max of at least 0"),
        ("optimize: {budget: {metric: mean_cosine, max: 1}}", "optimize.budget: should have a min of at most 1"),
        ("optimize: {budget: {metric: topk_agreement, min: 2}}", "optimize.budget: should have a min of at most 1"),
        ("optimize: {time_limit_s: 0}", "optimize.time_limit_s: should be greater than 0, got 0"),
        ("optimize: {objective: fast}", "optimize.objective: should be latency, throughput or {p99_ms: N}, got 'fast'"),
        ("optimize: {objective: {p99_ms: 0}}", "optimize.objective.p99_ms: should be greater than 0, got 0"),
        ("decoupled: 1", "decoupled: should be a valid boolean, got 1"),
        ("response_cache: {enable: true}", "response_cache: should be a valid boolean, got {'enable': True}"),
        ("response_cache: true\ndecoupled: true", "response_cache: is set together with decoupled, and "),
        ("response_cache: true\nsequence: {controls: []}", "response_cache: is set together with sequence, and "),
        ("sequence: {stratgy: direct}", "sequence.stratgy: unknown key; did you mean strategy?"),
        ("sequence: {strategy: newest}", "sequence.strategy: should be 'direct' or 'oldest', got 'newest'"),
        ("sequence: {max_idle_us: 0}", "sequence.max_idle_us: should be greater than or equal to 1, got 0"),
        ("sequence: {max_candidates: 3}", "sequence: max_candidates is 3, which only the strategy oldest has"),
        (
            "sequence: {strategy: oldest, minimum_slot_utilization: 0.5}",
            "sequence: minimum_slot_utilization is 0.5, which only the strategy direct has",
        ),
        (
            "sequence: {minimum_slot_utilization: 1.5}",
            "sequence.minimum_slot_utilization: should be less than or equal to 1, got 1.5",
        ),
        (
            "sequence: {controls: [{input: a, kind: begin, datatype: INT32}]}",
            "sequence.controls[0].kind: should be 'start', 'end', 'ready' or 'correlation_id', got 'begin'",
        ),
        (
            "sequence: {controls: [{input: a, kind: start, datatype: UINT64}]}",
            "sequence.controls[0]: has datatype UINT64, and a start is one of BOOL, INT32, FP32",
        ),
        (
            "sequence: {controls: [{input: a, kind: start, datatype: FP16}]}",
            "sequence.controls[0].datatype: should be ",
        ),
        (
            "sequence: {controls: [{input: a, kind: correlation_id, datatype: FP32}]}",
            "sequence.controls[0]: has datatype FP32, and a correlation_id is one of UINT64, ",
        ),
        (
            "sequence: {controls: [{input: a, kind: correlation_id, datatype: UINT64, values: [0, 1]}]}",
            "sequence.controls[0]: has values [0.0, 1.0], and a correlation_id has none",
        ),
        (
            "sequence: {controls: [{input: a, kind: end, datatype: INT32, values: [1]}]}",
            "sequence.controls[0]: has 1 values, expected two: for false and for true",
        ),
        (
            "sequence: {controls: [{input: a, kind: end, datatype: INT32, values: [0, 0.5]}]}",
            "sequence.controls[0]: has the value 0.5, which INT32 cannot hold",
        ),
        (
            "sequence: {controls: [{input: a, kind: end, datatype: BOOL, values: [0, 2]}]}",
            "sequence.controls[0]: has the value 2, which BOOL cannot hold",
        ),
        (
            "sequence: {controls: [{input: a, kind: end, datatype: FP32, values: [0, 1.0e+39]}]}",
            "sequence.controls[0]: has the value 1e+39, which FP32 cannot hold",
        ),
        (
            "sequence: {controls: [{input: a, kind: end, datatype: FP32, values: [0, .nan]}]}",
            "sequence.controls[0].values[1]: should be a finite number, got nan",
        ),
        (
            "sequence: {controls: [{input: a, kind: end, datatype: BOOL}, {input: b, kind: end, datatype: BOOL}]}",
            "sequence.controls[1].kind: 'end' is already the kind of the one at [0]",
        ),
        (
            (
                "sequence: {controls: [{input: a, kind: end, datatype: BOOL}], "
                "states: [{input: a, output: b, datatype: FP32, shape: [1]}]}"
            ),
            "sequence.states[0].input: 'a' is already the input of controls[0]",
        ),
        (
            (
                "sequence: {states: [{input: a, output: b, datatype: FP32, shape: [1]}, "
                "{input: c, output: b, datatype: FP32, shape: [1]}]}"
            ),
            "sequence.states[1].output: 'b' is already the output of the one at [0]",
        ),
        (
            "sequence: {states: [{input: a, output: b, datatype: FP32, shape: [99999, 99999]}]}",
            "sequence.states[0]: has a shape of more than 1073741824 bytes, [99999, 99999]",
        ),
        (
            "sequence: {states: [{input: a, output: b, datatype: FP32, shape: [1], initial: ../x}]}",
            "sequence.states[0].initial: should be a file name without a path",
        ),
        ("backend: ensemble", "ensemble: is required where backend is ensemble: its steps"),
        ("ensemble: [{model: a}]", "ensemble[0].outputs: is required"),
        ("ensemble: [{model: a, outputs: {}}]", "ensemble[0].outputs: should not be empty"),
        ("ensemble: [{model: a, outputs: {y: ''}}]", "ensemble[0].outputs.y: "),
        ("ensemble: [{model: a, outputs: {3: y}}]", "ensemble[0].outputs: keys should be strings, got 3"),
        ("ensemble: [{model: a, outputs: {y: y}, version: 0}]", "ensemble[0].version: should be greater than or"),
        ("ensemble: [{modle: a, model: a, outputs: {y: y}}]", "ensemble[0].modle: unknown key; did you mean model?"),
        ("backend: fake\nensemble: [{model: a, outputs: {y: y}}]", "backend: is 'fake', and an ensemble has none"),
        ("instances: [{}]\nensemble: [{model: a, outputs: {y: y}}]", "instances: is not for an ensemble, whose "),
        (
            "memory_limit_bytes: 1\nensemble: [{model: a, outputs: {y: y}}]",
            "memory_limit_bytes: is not for an ensemble",
        ),
        (
            "residency: {pinned: true}\nensemble: [{model: a, outputs: {y: y}}]",
            "residency: is not for an ensemble, who",
        ),
        (
            "outputs: [{name: y, datatype: FP32, shape: [1], labels: a/b.txt}]",
            "outputs[0].labels: should be a file name without a path, got 'a/b.txt'",
        ),
        (
            "max_batch_size: 8\nbatching: {preferred_sizes: [8, 9]}",
            "batching.preferred_sizes[1]: is 9, and max_batch_size is 8: expected no more",
        ),
        (
            "max_batch_size: 0\nbatching: {preferred_sizes: [1]}",
            "batching.preferred_sizes[0]: is 1, and max_batch_size is 0: nothing is merged with max_batch_size 0",
        ),
        (
            "max_batch_size: 8\ninputs: [{name: x, datatype: FP32, shape: [8, 3]}]",
            "inputs[0].shape: is [8, 3], and max_batch_size is 8: expected -1, the batch, as the first dimension",
        ),
        (
            "max_batch_size: 8\noutputs: [{name: x, datatype: FP32, shape: []}]",
            "outputs[0].shape: is [], and max_batch_size is 8: expected -1, the batch, as the first dimension",
        ),
        (
            "inputs: [{name: x, datatype: FP32, shape: [1]}, {name: x, datatype: FP32, shape: [1]}]",
            "inputs[1].name: 'x' is already the name of the one at [0]",
        ),
        (
            "batching: {priority_levels: 2, priorities: {3: {}}}",
            "batching.priorities[3]: is above priority_levels, which is 2",
        ),
        ("batching: {priorities: {1: {}}}", "batching.priorities[1]: is above priority_levels, which is 0"),
        ("batching: {priorities: {high: {}}}", "batching.priorities: keys should be whole numbers from 1, got 'high'"),
        (
            "batching: {priority_levels: 1, priorities: {1: {max_size: 3}}}",
            "batching.priorities[1].max_size: unknown key; did you mean max_queue_size?",
        ),
        (
            "batching: {default_priority: 2}",
            "batching.default_priority: is 2, and priority_levels is 0: expected no more",
        ),
        (
            "batching: {priority_levels: 2, preserve_order: true}",
            "batching.priority_levels: is 2, and with preserve_order nothing overtakes: expected 0",
        ),
        (
            "batching: {timeout_action: delay, preserve_order: true}",
            "batching.timeout_action: is delay, and with preserve_order nothing overtakes",
        ),
        (
            "batching: {priority_levels: 1, priorities: {1: {timeout_action: delay}}, preserve_order: true}",
            "batching.priorities[1].timeout_action: is delay, and with preserve_order nothing overtakes",
        ),
        ("batching: {timeout_action: wait}", "batching.timeout_action: should be 'reject' or 'delay', got 'wait'"),
        (
            "sequence: {}\nbatching: {timeout_action: delay}",
            "batching.timeout_action: is delay, and within a sequence nothing overtakes: expected reject",
        ),
        (
            "sequence: {}\nbatching: {priority_levels: 1, priorities: {1: {timeout_action: delay}}}",
            "batching.priorities[1].timeout_action: is delay, and within a sequence nothing overtakes",
        ),
        (
            "instances: [{rate_limit: {resources: {R: 0}}}]",
            "instances[0].rate_limit.resources.R: should be greater than or equal to 1, got 0",
        ),
        ("instances: [{rate_limit: {priority: 0}}]", "instances[0].rate_limit.priority: should be greater than or"),
        ("cpu_weight: 0.0", "cpu_weight: should be greater than 0, got 0.0"),
        ("backend: a\nbackend: b", "backend: is given twice, in line 1 and line 2"),
        ("batching: {priority_levels: 1, priority_levels: 2}", "batching.priority_levels: is given twice, in line 1"),
        ("instances:\n- {count: 1,\n   count: 1}", "instances[0].count: is given twice, in line 2 and line 3"),
        ("- a", "should be a mapping of keys to values, got ['a']"),
        ("just text", "should be a mapping of keys to values, got 'just text'"),
        ("backend: [", "line 1, column 11: while parsing a flow node, expected the node content"),
        ("a: 1\n b: 2", "line 2, column 3: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document in the stream"),
        ("backend: !!python/name:os.system", "line 1, column 10: could not determine a constructor for the tag"),
        ("backend: 2020-99-99", "is not YAML: month must be in 1..12"),
        ("backend: \0", "is not YAML: unacceptable character"),
        ("[" * 5000, "is nested too deeply"),
    ],
)
def test_one_problem(text, problem):
    (found,) = problems_of(text)
    assert found.startswith(problem)


def test_all_problems_at_once():
    text = """
max_batch_size: 8
max_queue: 1
inputs: [{name: x, datatype: FP, shape: [-3]}, {name: x, shape: [-1]}]
batching: {preferred_sizes: [x, 9], preserve_order: maybe, preserve_order: true}
instances: [{count: 0, device: tpu}]
"""
    paths = [problem.partition(": ")[0] for problem in problems_of(text)]
    assert sorted(paths) == [
        "batching.preferred_sizes[0]",
        "batching.preferred_sizes[1]",
        "batching.preserve_order",
        "inputs[0].datatype",
        "inputs[0].shape",
        "inputs[0].shape[0]",
        "inputs[1].datatype",
        "inputs[1].name",
        "instances[0].count",
        "instances[0].device",
        "max_queue",
    ]


def test_aliases_in_circles_end():
    problems = problems_of("parameters: &p {p: *p}")
    assert [problem.partition(": ")[0] for problem in problems] == ["parameters.p"]


def test_same_name_for_an_input_and_an_output_is_fine():
    tensor = "[{name: x, datatype: FP32, shape: [-1]}]"
    assert parse_config(f"inputs: {tensor}\noutputs: {tensor}").outputs[0].name == "x"


def test_a_configuration_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        parse_config("").batching.max_queue_size = 3


def test_paths_are_spelled_as_the_caller_says():
    with pytest.raises(ConfigError) as caught:
        build_config({"instances": [{"count": 0}]}, lambda path: ("instance_group", *path[1:]))
    assert caught.value.problems[0].startswith("instance_group[0].count: ")


def outcome(function, argument):
    """The problems that it tells of, at least one if it does not return; nothing else may be raised."""
    try:
        config = function(argument)
    except ConfigError as error:
        return error.problems or pytest.fail("no problem told")
    return [] if isinstance(config, ModelConfig) else pytest.fail("no configuration")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*ModelConfig.model_fields, "other"]), VALUES, max_size=4))
def test_whatever_is_written_gives_a_configuration_or_problems_with_paths(raw):
    for problem in outcome(build_config, raw):
        assert problem.startswith(tuple(raw))


@given(st.text())
def test_no_text_raises_anything_else(text):
    assert all(isinstance(problem, str) for problem in outcome(parse_config, text))


@pytest.mark.parametrize(
    ("batching", "adaptive"),
    [
        ("{p99_objective_ms: 50}", True),
        ("{p99_objective_ms: 0.5, max_queue_size: 9, priority_levels: 2}", True),
        ("{p99_objective_ms: 50.0, max_queue_delay_us: 0}", False),
        ("{p99_objective_ms: 50, preferred_sizes: [4]}", False),
        ("{}", False),
    ],
)
def test_an_objective_sets_sizes_and_delays_unless_the_owner_has(batching, adaptive):
    assert parse_config(f"batching: {batching}").batching.adaptive is adaptive


def test_the_objective_of_the_optimiser_is_another():
    assert parse_config("optimize: {objective: {p99_ms: 20}}").batching.p99_objective_ms is None


@pytest.mark.parametrize("value", ["0", "-1", ".inf", ".nan", "soon", "true", "3600001"])
def test_an_objective_is_a_time(value):
    with pytest.raises(ConfigError, match=r"^batching\.p99_objective_ms: "):
        parse_config(f"batching: {{p99_objective_ms: {value}}}")


@pytest.mark.parametrize("kind", ["decoupled: true", "sequence: {strategy: direct}"])
def test_an_objective_is_not_for_what_waits_for_something_else(kind):
    with pytest.raises(ConfigError, match=r"batching\.p99_objective_ms: is not for a"):
        parse_config(f"batching: {{p99_objective_ms: 50}}\n{kind}")
