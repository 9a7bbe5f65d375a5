"""What has to be there before a server starts."""

import socket

import pytest

from headrace import starting
from headrace.config import Settings
from headrace.starting import CannotStart, bind_all, check_folder, check_pairs


class Listening:
    """A socket that is not one, and whether it was closed."""

    def __init__(self):
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


@pytest.fixture
def bound(monkeypatch):
    """The sockets that were bound; port 2 is taken, there is no host ``nowhere``, 192.0.2.1 is another machine."""
    made = []

    def bind(host, port):
        if host == "nowhere":
            raise socket.gaierror(-2, "Name or service not known")
        if host == "192.0.2.1":
            raise OSError(99, "Cannot assign requested address")
        if port == 2:
            raise OSError(98, "Address already in use")
        made.append(Listening())
        return made[-1]

    monkeypatch.setattr(starting, "bind", bind)
    return made


def test_ports_are_bound_in_their_order_and_stay_so(bound):
    assert bind_all("127.0.0.1", [(1, "--http-port"), (3, "--grpc-port")]) == bound
    assert [one.closed for one in bound] == [False, False]


def test_where_one_is_taken_none_stays_bound_and_the_flag_to_change_is_told(bound):
    with pytest.raises(CannotStart, match=r"cannot listen on 127\.0\.0\.1:2 .*another port with --grpc-port, 0 for"):
        bind_all("127.0.0.1", [(1, "--http-port"), (2, "--grpc-port"), (3, "--metrics-port")])
    assert [one.closed for one in bound] == [True]


@pytest.mark.parametrize("host", ["nowhere", "192.0.2.1"])
def test_an_address_of_another_machine_is_told_as_that(bound, host):
    with pytest.raises(CannotStart, match=f"cannot listen on '{host}' .*an address of this machine, with --host"):
        bind_all(host, [(1, "--http-port")])


def test_a_repository_is_a_folder_even_an_empty_one(tmp_path):
    check_folder(tmp_path)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(CannotStart, match="there is no model repository at"):
            check_folder(path)


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"load_model": ("m",)}, {"model_control": "explicit"}),
        ({"load_model": ("m",), "model_control": "none"}, {"model_control": "explicit"}),
        ({"rate_limit_resource": ("seats:2",)}, {"rate_limit": "execution_count"}),
    ],
)
def test_an_option_that_would_do_nothing_without_another_is_refused(given, needed):
    (option,) = needed
    with pytest.raises(CannotStart, match=f"needs --{option.replace('_', '-')} {needed[option]}: with"):
        check_pairs(Settings(**given))
    check_pairs(Settings(**{**given, **needed}))
    check_pairs(Settings())
