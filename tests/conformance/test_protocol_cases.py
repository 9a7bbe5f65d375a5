"""Every case over every front end."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from cases import ECHOES, FAKE_X, INF, NAN, REFUSALS, STATUS, Echo, Refusal
from conftest import FRONTS, Fronts
from fronts import Answer, Call, GrpcFront, HttpFront
from wire_values import Given

from headrace.core.errors import Cancelled, Kind, of_kind
from headrace.frontends.infer_target import infer_target
from headrace.frontends.status import GRPC_STATUS, HTTP_STATUS, http_status

Front = HttpFront | GrpcFront


def _status(front: Front, kind: str) -> int | str:
    return STATUS[kind][isinstance(front, GrpcFront)]


@pytest.mark.parametrize("case", ECHOES, ids=lambda case: case.name)
def test_a_case_gives_the_same_over_every_front_end(front: Front, case: Echo):
    answer = front.infer(case.call)
    if not all(front.can_carry(tensor) for tensor in case.call.inputs):
        assert answer.status == _status(front, "INVALID")
        assert case.call.model in answer.message
        return
    assert answer.ok, answer.message
    assert (answer.model, answer.version, answer.id) == (case.call.model, case.version, case.call.id)
    assert [_form(tensor) for tensor in answer.outputs] == [_form(tensor) for tensor in case.outputs]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
def test_a_refusal_is_of_the_same_kind_over_every_front_end(front: Front, case: Refusal):
    answer = front.infer(case.call)
    assert answer.status == _status(front, case.kind), answer.message
    for text in case.says:
        assert text in answer.message


def _form(tensor: Given) -> tuple[str, str, tuple[int, ...], bytes]:
    """For comparing: NaN equals NaN, and -0.0 is not 0.0."""
    return tensor.name, tensor.datatype, tensor.shape, tensor.raw


def test_the_comparison_tells_what_equality_does_not():
    negative, zero = Given("x", "FP32", (1,), (-0.0,)), Given("x", "FP32", (1,), (0.0,))
    nan, infinite = Given("x", "FP32", (1,), (NAN,)), Given("x", "FP32", (1,), (INF,))
    assert len({_form(tensor) for tensor in (negative, zero, nan, infinite)}) == 4
    assert _form(nan) == _form(Given("x", "FP32", (1,), (NAN,)))


def test_the_ordinary_route_is_not_the_lane():
    assert infer_target(b"/v2/models/m/infer") == ("m", "")
    assert infer_target(b"/v2/models/m/%69nfer") is None


@pytest.mark.parametrize("name", FRONTS)
def test_a_full_queue_refuses_at_once(fronts: Fronts, name: str):
    running, staged, may_wait, more = 1, 1, 2, 4  # of the model "fake"
    slow = Call("fake", (FAKE_X,), parameters={"fake_delay_ms": 150})
    front = fronts.open(name)
    for _ in range(5):  # on a machine that stands still for a while they may come one after the other
        with ThreadPoolExecutor(running + staged + may_wait + more) as pool:
            sent = [pool.submit(fronts.infer, name, slow) for _ in range(pool._max_workers)]
            answers: list[Answer] = [one.result(60) for one in sent]
        refused = [answer for answer in answers if not answer.ok]
        if refused:
            break
    assert refused
    assert len(answers) - len(refused) >= running + staged
    assert {answer.status for answer in refused} == {_status(front, "OVERLOADED")}
    assert all("Exceeds maximum queue size" in answer.message for answer in refused)


def test_requests_of_many_clients_do_not_mix(fronts: Fronts):
    barrier = threading.Barrier(len(FRONTS))

    def ask(index: int) -> None:
        front = fronts.open(FRONTS[index])
        barrier.wait(60)
        for turn in range(40):
            number = index * 1000 + turn
            numbers = Given("numbers", "INT32", (1, 2), (number, turn))
            texts = Given("texts", "BYTES", (1, 1), (f"{number}".encode(),))
            answer = front.infer(Call("rows", (numbers, texts), id=str(number)))
            assert answer.ok, answer.message
            assert answer.id == str(number)
            assert [tensor.values for tensor in answer.outputs] == [
                (number + turn,),
                (f"{number}".encode(),),
                (number, turn),
            ]

    with ThreadPoolExecutor(len(FRONTS)) as pool:
        list(pool.map(ask, range(len(FRONTS))))


def test_both_tables_cover_every_kind():
    assert set(HTTP_STATUS) == set(GRPC_STATUS) == set(Kind)
    for kind in Kind:
        error = of_kind(kind, "why")
        assert (error.kind, str(error)) == (kind, "why")
        assert 400 <= http_status(error)[0] < 600


def test_the_statuses_are_those_of_the_protocol():
    for name, (status, code) in STATUS.items():
        assert HTTP_STATUS[Kind[name]] == status
        assert GRPC_STATUS[Kind[name]].name == code
    assert HTTP_STATUS[Kind.TOO_LARGE] == 413
    assert HTTP_STATUS[Kind.FORBIDDEN] == 503
    assert GRPC_STATUS[Kind.FORBIDDEN].name == "UNAVAILABLE"
    assert GRPC_STATUS[Cancelled.kind].name == "CANCELLED"


@pytest.mark.parametrize("kind", Kind)
def test_only_what_may_pass_says_when_to_come_back(kind: Kind):
    _, headers = http_status(of_kind(kind, "why"))
    assert ("Retry-After" in headers) == (kind in {Kind.NOT_READY, Kind.OVERLOADED, Kind.DEADLINE})
