"""A model whose sequences are kept by the worker: controls in, states in and out, rows in their places."""

import numpy as np
import pytest

from headrace.core.model import Signature, TensorSpec
from headrace.core.sequence import ControlSpec, SequenceSpec, StateSpec
from headrace.core.tensor import DataType
from headrace.workers.stateful import Stateful
from headrace.workers.stateful_checks import misfits
from headrace.workers.warmup import warm_up
from headrace_backends.base import Answer, Backend, InputError, LoadError, RequestInfo

FP32, INT32, UINT64, BYTES, BOOL = (
    DataType.FP32,
    DataType.INT32,
    DataType.UINT64,
    DataType.BYTES,
    DataType.BOOL,
)
CONTROLS = (
    ControlSpec("START", "start", INT32, (0, 1)),
    ControlSpec("END", "end", FP32, (-1, 1)),
    ControlSpec("READY", "ready", BOOL),
    ControlSpec("ID", "correlation_id", UINT64),
)
STATE = StateSpec("sum_in", "sum_out", FP32, (2,))


def signature_of(batches=True, controls=CONTROLS, states=(STATE,), decoupled=False):
    def spec(name, datatype, *row):
        return TensorSpec(name, datatype, (-1, *row) if batches else row)

    return Signature(
        (
            spec("x", FP32, 2),
            *(spec(one.input, one.datatype, 1) for one in controls),
            *(spec(one.input, one.datatype, *one.shape) for one in states),
        ),
        (spec("y", FP32, 2), *(spec(one.output, one.datatype, *one.shape) for one in states)),
        8 if batches else 0,
        decoupled,
    )


class Adder(Backend):
    """Its state is the sum of what the sequence has brought, which is its answer too. It keeps what it was given."""

    def __init__(self, signature=None, answers=False):
        self._signature = signature or signature_of()
        self.wants_requests = answers
        self.cpu_threads = 3
        self.warms_up = True
        self.seen = []
        self.told = []
        self.fails = ()  # requests, by id, that fail: the batch, or one answer
        self.closed = False

    @classmethod
    def load(cls, source):
        raise NotImplementedError

    @property
    def signature(self):
        return self._signature

    def execute(self, inputs, requests):
        self.seen.append({name: array.copy() for name, array in inputs.items()})
        self.told.append(list(requests))
        if self.fails and not self.wants_requests:
            raise RuntimeError("broken")
        total = inputs["x"] + inputs["sum_in"] if "sum_in" in inputs else inputs["x"]
        if "sum_in" in inputs:
            inputs["sum_in"][...] = 99  # as a framework may that works in place
        outputs = {"y": total, "sum_out": total}
        if not self.wants_requests:
            return outputs
        return [
            Answer(error=RuntimeError("broken"))
            if one.id in self.fails
            else Answer({name: array[row : row + 1] for name, array in outputs.items()}, {"row": row})
            for row, one in enumerate(requests)
        ]

    def notes(self):
        return ["a note"]

    def close(self):
        self.closed = True


def spec_of(strategy="oldest", controls=CONTROLS, states=(STATE,)):
    return SequenceSpec(strategy, controls=controls, states=states)


def info(identity, marks="", slot=0, **more):
    parameters = {"sequence_id": identity, "sequence_start": "s" in marks, "sequence_end": "e" in marks}
    return RequestInfo(1, more.pop("id", ""), parameters, slot=slot, **more)


def rows(*values):
    return {"x": np.array([[one, one] for one in values], np.float32)}


def run(model, values, requests):
    """The first column of what clients get."""
    result = model.execute(rows(*values), requests)
    if isinstance(result, dict):
        assert set(result) == {"y"}
        return result["y"][:, 0].tolist()
    return [float(one.outputs["y"][0, 0]) if one.error is None else str(one.error) for one in result]


# -- what clients see -------------------------------------------------------------------------------------


def test_clients_neither_see_nor_give_what_the_server_adds():
    backend = Adder()
    model = Stateful(backend, spec_of())
    assert [one.name for one in model.signature.inputs] == ["x"]
    assert [one.name for one in model.signature.outputs] == ["y"]
    assert model.signature.max_batch_size == 8
    assert (model.wants_requests, model.cpu_threads, model.warms_up, model.notes()) == (True, 3, True, ["a note"])
    model.close()
    assert backend.closed


def test_it_can_be_warmed_up_and_remembers_nothing_of_that():
    for strategy in ("oldest", "direct"):
        backend = Adder()
        model = Stateful(backend, spec_of(strategy))
        assert "takes" in warm_up(model)[0]
        assert len(backend.seen) == 2
        assert run(model, [1], [info(5, "s")]) == [1]


# -- states -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("strategy", ["oldest", "direct"])
def test_what_came_out_goes_in_again_for_each_sequence_by_itself(strategy, answers):
    model = Stateful(Adder(answers=answers), spec_of(strategy))
    assert run(model, [1, 10], [info(5, "s", 0), info(6, "s", 1)]) == [1, 10]
    assert run(model, [2], [info(5, "", 0)]) == [3]
    assert run(model, [20, 3], [info(6, "e", 1), info(5, "", 0)]) == [30, 6]
    assert run(model, [100], [info(6, "s", 1)]) == [100]


def test_the_first_state_is_zeros_or_what_the_owner_says():
    initial = np.array([7, 8], np.float32).tobytes()
    model = Stateful(Adder(), spec_of(states=(StateSpec("sum_in", "sum_out", FP32, (2,), initial),)))
    for _ in range(2):
        assert model.execute(rows(1), [info(5, "s")])["y"].tolist() == [[8, 9]]


def test_beginning_anew_forgets_the_state():
    model = Stateful(Adder(), spec_of())
    run(model, [5], [info(5, "s")])
    assert run(model, [1], [info(5, "s")]) == [1]
    assert run(model, [1], [info(5)]) == [2]


@pytest.mark.parametrize("answers", [False, True])
def test_a_run_that_failed_changes_no_state(answers):
    backend = Adder(answers=answers)
    model = Stateful(backend, spec_of())
    run(model, [1], [info(5, "s")])
    backend.fails = {"bad"}
    for marks in ("", "e"):
        if answers:
            assert run(model, [50], [info(5, marks, id="bad")]) == ["broken"]
        else:
            with pytest.raises(RuntimeError, match="broken"):
                run(model, [50], [info(5, marks)])
    backend.fails = ()
    assert run(model, [2], [info(5)]) == [3]


def test_of_separate_answers_only_the_good_ones_count():
    backend = Adder(answers=True)
    model = Stateful(backend, spec_of())
    run(model, [1, 2], [info(1, "s", 0), info(2, "s", 1)])
    backend.fails = {"bad"}
    assert run(model, [10, 10], [info(1, "", 0, id="bad"), info(2, "", 1)]) == ["broken", 12]
    backend.fails = ()
    assert run(model, [1, 1], [info(1, "", 0), info(2, "", 1)]) == [2, 13]


def test_a_first_request_that_failed_leaves_nothing_of_the_sequence_before():
    backend = Adder()
    model = Stateful(backend, spec_of())
    run(model, [50], [info(5, "s")])
    backend.fails = {"any"}
    with pytest.raises(RuntimeError):
        run(model, [1], [info(5, "s")])
    backend.fails = ()
    assert run(model, [1], [info(5)]) == [1]


@pytest.mark.parametrize("marks", ["", "e"])
def test_nothing_is_known_of_one_that_was_not_begun_here_or_has_ended(marks):
    model = Stateful(Adder(), spec_of())
    with pytest.raises(InputError, match="nothing is known of sequence 5; begin it anew with sequence_start"):
        run(model, [1], [info(5, marks)])
    run(model, [1], [info(5, "se")])
    with pytest.raises(InputError, match="sequence 5"):
        run(model, [1], [info(5, marks)])


def test_the_next_sequence_of_a_place_does_not_find_the_state_of_the_one_before():
    model = Stateful(Adder(), spec_of())
    run(model, [1], [info(5, "s")])
    run(model, [1], [info(6, "s")])
    with pytest.raises(InputError, match="sequence 5"):
        run(model, [1], [info(5)])
    with pytest.raises(InputError, match="nothing is known of sequence 6"):
        run(model, [1], [info("6")])
    assert run(model, [1], [info(6)]) == [2]


def test_no_more_states_are_kept_than_there_are_places():
    model = Stateful(Adder(), spec_of())
    for identity in range(1, 200):
        run(model, [1], [info(identity, "s", identity % 4)])
    assert len(model._kept) == 4
    run(model, [1], [info(199, "e", 3)])
    assert len(model._kept) == 3


def test_states_are_copies_of_what_the_model_gave():
    given = np.array([[4, 4]], np.float32)

    class Reuses(Adder):
        def execute(self, inputs, requests):
            self.seen.append(inputs["sum_in"].copy())
            return {"y": given, "sum_out": given}

    backend = Reuses()
    model = Stateful(backend, spec_of())
    run(model, [0], [info(5, "s")])
    given[:] = 9
    run(model, [0], [info(5)])
    assert backend.seen[1].tolist() == [[4, 4]]


def test_a_model_without_states_of_its_own_keeps_its_own_counsel():
    backend = Adder(signature_of(states=()))
    model = Stateful(backend, spec_of(states=()))
    assert run(model, [1], [info(5)]) == [1]
    assert model._kept == {}


def test_states_that_grow_are_run_with_others_of_their_shape():
    growing = StateSpec("h", "h_out", FP32, (-1,))

    class Grower(Adder):
        memory = np.zeros((4, 2), np.float32)  # of every run's output

        def execute(self, inputs, requests):
            self.seen.append(inputs["h"].shape)
            y = self.memory[: len(inputs["x"])]
            y[...] = inputs["x"]
            grown = np.concatenate([inputs["h"], inputs["x"][:, :1]], axis=1)
            if self.wants_requests:
                return [Answer({"y": inputs["x"][i : i + 1], "h_out": grown[i : i + 1]}) for i in range(len(requests))]
            return {"y": y, "h_out": grown}

    for answers in (False, True):
        backend = Grower(signature_of(states=(growing,)), answers)
        model = Stateful(backend, spec_of(states=(growing,)))
        run(model, [1], [info(1, "s", 0)])
        assert run(model, [2, 3, 4], [info(1, "", 0), info(2, "s", 1), info(3, "s", 2)]) == [2, 3, 4]
        assert backend.seen == [(1, 1), (1, 2), (2, 1)]
        assert run(model, [5], [info(1, "", 0)]) == [5]
        assert backend.seen[-1] == (1, 3)


def test_states_of_bytes():
    names = StateSpec("n", "n_out", BYTES, (1,))

    class Namer(Adder):
        def execute(self, inputs, requests):
            self.seen.append(inputs["n"].tolist())
            return {"y": inputs["x"], "n_out": np.array([[one + b"a"] for (one,) in inputs["n"]], np.object_)}

    backend = Namer(signature_of(states=(names,)))
    model = Stateful(backend, spec_of("direct", states=(names,)))
    run(model, [1], [info(1, "s", 0)])
    run(model, [1, 1], [info(1, "", 0), info(2, "s", 2)])
    assert backend.seen == [[[b""]], [[b"a"], [b""], [b""]]]


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({"y": np.zeros((1, 2), np.float32)}, "did not give the output 'sum_out'"),
        ({"sum_out": np.zeros((1, 2), np.float32)}, "did not give the output 'y'"),
        (
            {"y": np.zeros((1, 2), np.float32), "sum_out": np.zeros((1, 3), np.float32)},
            r"has shape \[3\], expected \[2\]",
        ),
        ({"y": np.zeros((1, 2), np.float32), "sum_out": np.zeros((2, 2), np.float32)}, "for a batch of 1 rows"),
        ({"y": np.zeros((2, 2), np.float32), "sum_out": np.zeros((1, 2), np.float32)}, "for a batch of 1 rows"),
        ({"y": np.zeros((1, 2), np.float32), "sum_out": np.zeros((1, 2))}, "has datatype FP64, expected FP32"),
        ({"y": np.zeros((1, 2)), "sum_out": np.zeros((1, 2), np.float32)}, "has datatype FP64, expected FP32"),
    ],
)
def test_outputs_that_are_not_as_declared_change_no_state(outputs, words):
    class Wrong(Adder):
        def execute(self, inputs, requests):
            return outputs if self.fails else super().execute(inputs, requests)

    backend = Wrong()
    model = Stateful(backend, spec_of())
    run(model, [1], [info(5, "s")])
    backend.fails = {"any"}
    with pytest.raises((RuntimeError, TypeError), match=words):
        run(model, [1], [info(5)])
    backend.fails = ()
    assert run(model, [2], [info(5)]) == [3]


def test_of_separate_answers_one_without_its_state_is_an_error_of_its_own():
    class Forgetful(Adder):
        def execute(self, inputs, requests):
            first, *others = super().execute(inputs, requests)
            return [Answer({"y": first.outputs["y"]}), *others]

    model = Stateful(Forgetful(answers=True), spec_of())
    answers = model.execute(rows(1, 2), [info(3, "se", 2), info(2, "s", 1)])
    assert answers[0].error is None, "a sequence that has ended needs no state"
    answers = model.execute(rows(1, 2), [info(1, "s", 0), info(2, "", 1)])
    assert "did not give the output 'sum_out'" in str(answers[0].error)
    assert (answers[1].error, set(answers[1].outputs), answers[1].parameters) == (None, {"y"}, {"row": 1})


def test_a_wrong_number_of_answers_is_the_models_fault():
    class Few(Adder):
        def execute(self, inputs, requests):
            return []

    with pytest.raises(RuntimeError, match="it gave 0 answers to 1 requests"):
        Stateful(Few(answers=True), spec_of()).execute(rows(1), [info(5, "s")])


# -- controls ---------------------------------------------------------------------------------------------


def test_controls_say_of_each_row_what_its_request_said():
    backend = Adder()
    model = Stateful(backend, spec_of())
    run(model, [1, 2, 3], [info(7, "s", 0), info(2**64 - 1, "se", 1), info(9, "s", 2)])
    run(model, [1, 2], [info(9, "e", 2), info(7, "", 0)])
    first, second = backend.seen
    assert {name: array[:, 0].tolist() for name, array in first.items() if name not in ("x", "sum_in")} == {
        "START": [1, 1, 1],
        "END": [-1, 1, -1],
        "READY": [True, True, True],
        "ID": [7, 2**64 - 1, 9],
    }
    assert {name: array[:, 0].tolist() for name, array in second.items() if name not in ("x", "sum_in")} == {
        "START": [0, 0],
        "END": [1, -1],
        "READY": [True, True],
        "ID": [9, 7],
    }
    assert [first[name].dtype for name in ("START", "END", "READY", "ID")] == [
        np.int32,
        np.float32,
        np.bool_,
        np.uint64,
    ]
    assert all(first[one.input].shape == (3, 1) for one in CONTROLS)


@pytest.mark.parametrize(
    ("batches", "declared", "expected"),
    [
        (True, (-1, 1), (2, 1)),
        (True, (-1,), (2,)),
        (True, (-1, 1, 1), (2, 1, 1)),
        (True, None, (2, 1)),
        (False, (1,), (1,)),
        (False, (), ()),
        (False, (1, 1), (1, 1)),
        (False, None, (1,)),
    ],
)
def test_a_control_has_the_dimensions_that_the_model_declares(batches, declared, expected):
    shape = (-1, 2) if batches else (2,)
    x, y, start = TensorSpec("x", FP32, shape), TensorSpec("y", FP32, shape), TensorSpec("START", INT32, declared)
    backend = Adder(Signature((x, start), (y,), 4 if batches else 0))
    model = Stateful(backend, spec_of(controls=CONTROLS[:1], states=()))
    if batches:
        model.execute(rows(1, 2), [info(1, "s", 0), info(2, "s", 1)])
    else:
        model.execute({"x": np.zeros(2, np.float32)}, [info(1, "s", 0)])
    assert backend.seen[0]["START"].shape == expected
    assert backend.seen[0]["START"].all()


def test_ids_of_strings_are_bytes_to_the_model():
    controls = (ControlSpec("ID", "correlation_id", BYTES),)
    backend = Adder(signature_of(controls=controls))
    model = Stateful(backend, spec_of("direct", controls=controls))
    run(model, [1, 2], [info("é", "s", 0), info("b", "s", 2)])
    assert backend.seen[0]["ID"].tolist() == [["é".encode()], [b""], [b"b"]]


@pytest.mark.parametrize(
    ("datatype", "largest"), [(DataType.INT64, 2**63 - 1), (DataType.UINT32, 2**32 - 1), (INT32, 2**31 - 1)]
)
def test_the_largest_ids_fit(datatype, largest):
    controls = (ControlSpec("ID", "correlation_id", datatype),)
    backend = Adder(signature_of(controls=controls))
    run(Stateful(backend, spec_of(controls=controls)), [1], [info(largest, "s")])
    assert backend.seen[0]["ID"].tolist() == [[largest]]


# -- rows and places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [False, True])
def test_with_direct_every_sequence_is_in_its_row_and_the_others_are_not_ready(answers):
    backend = Adder(answers=answers)
    model = Stateful(backend, spec_of("direct"))
    assert run(model, [1, 2], [info(7, "s", 1), info(9, "s", 3)]) == [1, 2]
    assert run(model, [5], [info(9, "", 3)]) == [7]
    first, second = backend.seen
    assert first["x"].tolist() == [[0, 0], [1, 1], [0, 0], [2, 2]]
    assert first["READY"][:, 0].tolist() == [False, True, False, True]
    assert first["START"][:, 0].tolist() == [0, 1, 0, 1]
    assert first["END"][:, 0].tolist() == [-1, -1, -1, -1]
    assert first["ID"][:, 0].tolist() == [0, 7, 0, 9]
    assert second["sum_in"].tolist() == [[0, 0], [0, 0], [0, 0], [2, 2]], "what is not there has no state"
    if answers:
        assert [one.parameters.get("sequence_id") for one in backend.told[0]] == [None, 7, None, 9]
    else:
        assert backend.told[0] == []


def test_with_direct_rows_out_of_order_come_back_in_the_order_of_the_requests():
    model = Stateful(Adder(), spec_of("direct"))
    assert run(model, [1, 2], [info(7, "s", 1), info(9, "s", 0)]) == [1, 2]


def test_with_oldest_a_place_is_no_row():
    backend = Adder()
    model = Stateful(backend, spec_of("oldest"))
    assert run(model, [1], [info(7, "s", 900)]) == [1]
    assert backend.seen[0]["x"].shape == (1, 2)


def test_a_model_that_does_not_batch():
    backend = Adder(signature_of(batches=False))
    model = Stateful(backend, spec_of("direct"))
    x = np.array([1, 2], np.float32)
    model.execute({"x": x}, [info(7, "s", 0)])
    result = model.execute({"x": x}, [info(7, "e", 0)])
    assert result["y"].tolist() == [2, 4]
    assert backend.seen[1]["END"].tolist() == [1]
    assert backend.seen[1]["sum_in"].tolist() == [1, 2]


def test_a_run_that_wrote_over_its_inputs_and_failed_changes_no_state():
    class Wrecker(Adder):
        def execute(self, inputs, requests):
            if self.fails:
                inputs["sum_in"][...] = 99
                raise RuntimeError("broken")
            return super().execute(inputs, requests)

    for batches in (True, False):
        backend = Wrecker(signature_of(batches))
        model = Stateful(backend, spec_of())
        x = rows(1) if batches else {"x": np.ones(2, np.float32)}
        model.execute(x, [info(5, "s")])
        backend.fails = {"any"}
        with pytest.raises(RuntimeError, match="broken"):
            model.execute(x, [info(5)])
        backend.fails = ()
        assert model.execute(x, [info(5)])["y"].flatten().tolist() == [2, 2]


def test_where_outputs_are_chosen_the_states_are_asked_for_too():
    backend = Adder(answers=True)
    model = Stateful(backend, spec_of())
    model.execute(rows(1, 2), [info(1, "s", 0, outputs=("y",)), info(2, "s", 1)])
    assert [one.outputs for one in backend.told[0]] == [("y", "sum_out"), ()]


# -- decoupled --------------------------------------------------------------------------------------------


class Stream:
    """A client's end."""

    def __init__(self, request):
        self.request = request
        self.cancelled = False
        self.sent = []
        self.ended = False

    def send(self, answer):
        self.sent.append(answer)

    def end(self, error=None):
        self.ended, self.error = True, error


class Counter(Adder):
    """Counts on from its state: three responses to a request, each with a new state."""

    def __init__(self, by_stream=False):
        super().__init__(signature_of(decoupled=True))
        self.by_stream = by_stream
        self.closed_early = False

    def _answers(self, inputs):
        try:
            total = inputs["sum_in"]
            for _ in range(3):
                total = total + inputs["x"]
                yield Answer({"y": total, "sum_out": total}, {"n": 1})
            yield Answer({"y": total})
        except GeneratorExit:
            self.closed_early = True
            raise

    def begin(self, inputs, stream):
        self.seen.append(inputs)
        self.told.append(stream.request)
        if not self.by_stream:
            self.iterator = self._answers(inputs)
            return self.iterator
        assert not stream.cancelled
        for answer in self._answers(inputs):
            stream.send(answer)
        stream.end()
        return None


@pytest.mark.parametrize("by_stream", [False, True])
def test_responses_of_a_decoupled_model_bring_states_along(by_stream):
    backend = Counter(by_stream)
    model = Stateful(backend, spec_of("direct"))
    assert model.signature.decoupled

    def responses(marks):
        stream = Stream(info(5, marks, 3, outputs=("y",)))
        answers = model.begin(rows(1), stream)
        found = stream.sent if by_stream else list(answers)
        assert stream.ended == by_stream
        assert all(set(one.outputs) == {"y"} for one in found)
        assert found[0].parameters == {"n": 1}
        return [float(one.outputs["y"][0, 0]) for one in found]

    assert responses("s") == [1, 2, 3, 3]
    assert responses("e") == [4, 5, 6, 6]
    assert backend.seen[1]["x"].shape == (1, 2)
    assert backend.seen[1]["END"].tolist() == [[1]]
    assert backend.told[0].outputs == ("y", "sum_out")
    assert model._kept == {}


def test_a_stream_that_the_model_ends_with_an_error_keeps_what_came():
    class Failing(Counter):
        def begin(self, inputs, stream):
            for answer in self._answers(inputs):
                stream.send(answer)
            stream.end(RuntimeError("as asked"))

    model = Stateful(Failing(), spec_of())
    for marks, expected in (("s", [1, 2, 3, 3]), ("", [4, 5, 6, 6]), ("s", [1, 2, 3, 3])):
        stream = Stream(info(5, marks))
        assert model.begin(rows(1), stream) is None
        assert str(stream.error) == "as asked"
        assert [float(one.outputs["y"][0, 0]) for one in stream.sent] == expected


def test_a_stream_that_is_left_closes_the_models_own_and_keeps_what_came():
    backend = Counter()
    model = Stateful(backend, spec_of())
    answers = model.begin(rows(1), Stream(info(5, "s")))
    next(answers)
    answers.close()
    assert backend.closed_early
    assert [float(one.outputs["y"][0, 0]) for one in model.begin(rows(1), Stream(info(5)))] == [2, 3, 4, 4]


def test_what_comes_late_is_not_the_state_of_the_next_sequence_of_the_place():
    model = Stateful(Counter(), spec_of())
    late = model.begin(rows(100), Stream(info(5, "se")))
    next(late)
    list(model.begin(rows(1), Stream(info(6, "s"))))
    list(late)
    assert [float(one.outputs["y"][0, 0]) for one in model.begin(rows(1), Stream(info(6)))] == [4, 5, 6, 6]


# -- what does not go together ----------------------------------------------------------------------------


def test_everything_that_does_not_fit_the_model_is_told_at_once():
    spec = SequenceSpec(
        controls=(
            ControlSpec("GO", "start", INT32),
            ControlSpec("START", "start", FP32),
            ControlSpec("x", "end", FP32),
        ),
        states=(
            StateSpec("sum_in", "y", FP32, (3,)),
            StateSpec("START", "nothing", INT32, (1,)),
        ),
    )
    with pytest.raises(LoadError) as refused:
        Stateful(Adder(), spec)
    assert str(refused.value).split("; ") == [
        "input 'START' is named twice by the sequences",
        "the model has no start control input 'GO'",
        "it has ['x', 'START', 'END', 'READY', 'ID', 'sum_in']",
        "start control input 'START' is configured as FP32",
        "the model has INT32",
        "control input 'x' has shape [-1, 2], expected [-1, 1]",
        "state input 'sum_in' is configured with shape [3]",
        "the model has [2]",
        "state output 'y' is configured with shape [3]",
        "the model has [2]",
        "the model has no state output 'nothing'",
        "it has ['y', 'sum_out']",
    ]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (StateSpec("sum_in", "sum_out", FP32, (2,), b"1234"), "has 4 bytes, expected 2 elements of FP32"),
        (StateSpec("sum_in", "sum_out", FP32, (-1,)), r"configured with shape \[-1\]; the model has \[2\]"),
        (StateSpec("sum_in", "sum_out", INT32, (2,)), "is configured as INT32; the model has FP32"),
    ],
)
def test_a_state_that_the_model_could_not_begin_with_is_refused(state, words):
    with pytest.raises(LoadError, match=words):
        Stateful(Adder(), spec_of(states=(state,)))


def test_an_initial_state_of_bytes_has_to_be_whole_elements():
    state = StateSpec("n", "n_out", BYTES, (1,), b"\x09\0\0\0abc")
    (problem,) = misfits(signature_of(states=(state,)), spec_of(states=(state,)))
    assert problem.startswith("the initial state of 'n' ends inside")


def test_what_fits_has_no_problems():
    assert misfits(signature_of(), spec_of()) == []
    assert misfits(signature_of(batches=False), spec_of()) == []
