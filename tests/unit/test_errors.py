"""The kinds of error and what each front end calls them."""

import grpc
import pytest

from headrace.core import errors
from headrace.core.errors import HeadraceError, Kind, of_kind
from headrace.frontends.status import GRPC_STATUS, HTTP_STATUS, StatusCode, http_status

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, HeadraceError) and value is not HeadraceError
]


def test_every_kind_has_one_class_and_every_class_a_kind_of_its_own():
    assert sorted(one.kind.name for one in CLASSES) == sorted(kind.name for kind in Kind)


def test_both_front_ends_have_a_status_for_every_kind():
    assert set(HTTP_STATUS) == set(GRPC_STATUS) == set(Kind)


def test_status_codes_are_those_of_grpc():
    assert {one.name: one.value for one in StatusCode} == {one.name: one.value[0] for one in grpc.StatusCode}


@pytest.mark.parametrize("kind", Kind)
def test_an_error_that_crossed_a_process_boundary_is_the_same_again(kind):
    error = of_kind(Kind(kind.value), "model 'm': broken")
    assert (error.kind, str(error)) == (kind, "model 'm': broken")
    assert type(error) is type(of_kind(kind, "")), "one class a kind"
    assert isinstance(error, HeadraceError)


@pytest.mark.parametrize("kind", Kind)
def test_only_our_own_faults_look_like_ours(kind):
    is_ours = kind is Kind.INTERNAL
    assert (HTTP_STATUS[kind] == 500) is is_ours
    assert (GRPC_STATUS[kind] is StatusCode.INTERNAL) is is_ours
    assert 400 <= HTTP_STATUS[kind] <= 599
    assert GRPC_STATUS[kind] is not StatusCode.OK


@pytest.mark.parametrize(
    ("kind", "http", "code"),
    [
        (Kind.INVALID, 400, "INVALID_ARGUMENT"),
        (Kind.NOT_FOUND, 404, "NOT_FOUND"),
        (Kind.OVERLOADED, 503, "UNAVAILABLE"),
        (Kind.NOT_READY, 503, "UNAVAILABLE"),
        (Kind.TOO_LARGE, 413, "INVALID_ARGUMENT"),
        (Kind.UNSUPPORTED, 501, "UNIMPLEMENTED"),
        (Kind.DEADLINE, 503, "DEADLINE_EXCEEDED"),
    ],
)
def test_the_statuses_that_clients_act_on(kind, http, code):
    assert (HTTP_STATUS[kind], GRPC_STATUS[kind].name) == (http, code)


@pytest.mark.parametrize("kind", Kind)
def test_clients_are_told_to_come_back_only_where_coming_back_may_help(kind):
    status, headers = http_status(of_kind(kind, "no"))
    assert status == HTTP_STATUS[kind]
    comes_back = kind in {Kind.NOT_READY, Kind.OVERLOADED, Kind.DEADLINE}
    assert ("Retry-After" in headers) is comes_back
    if comes_back:
        assert int(headers["Retry-After"]) >= 1


def test_an_error_of_no_kind_is_our_fault():
    assert HeadraceError("odd").kind is Kind.INTERNAL
