"""``headrace bench``: how many clients come next and where the knee is, percentiles, made-up inputs, what is shown."""

import asyncio
import importlib.util
import json
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench.command import BenchArguments, choose_addresses, run
from headrace.bench.http_traffic import HttpTraffic
from headrace.bench.knee import WORTH, Point, knee, most_steps, next_clients
from headrace.bench.made_up import make_up, parse_shape
from headrace.bench.report import Protocol, describe, draw, to_document, write_json
from headrace.bench.sweep import Limits, Step
from headrace.bench.tally import MOST_PROBLEMS, Latencies, Tally, percentile
from headrace.client import ModelMetadata, TensorMetadata
from headrace.client.address import Address
from headrace.client.command_values import BadArgument
from headrace.client.http_form import HttpRequest

# The knee


def points(**rates):
    return [Point(int(clients.removeprefix("c")), rate) for clients, rate in rates.items()]


def test_the_knee_is_the_fewest_clients_within_five_per_cent_of_the_best():
    assert knee(points(c1=100, c2=190, c4=300, c8=310, c16=312)) == Point(4, 300)
    assert knee(points(c1=100, c2=190, c4=294, c8=310)) == Point(8, 310)
    assert knee(points(c8=310, c1=100, c4=300)) == Point(4, 300)  # in whatever order they were measured
    assert knee(points(c1=100, c2=50)) == Point(1, 100)
    assert knee(points(c1=0, c2=0)) is None
    assert knee([]) is None


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1e6)), max_size=20))
def test_nobody_with_fewer_clients_than_the_knee_is_as_good(measured):
    found = knee([Point(*one) for one in measured])
    best = max((rate for _, rate in measured), default=0)
    if best == 0:
        assert found is None
    else:
        assert found.requests_per_s >= best * (1 - WORTH)
        assert not [rate for clients, rate in measured if clients < found.clients and rate >= best * (1 - WORTH)]


def swept(rate_of, most=256):
    """What a sweep asks for when so many clients get so much."""
    done = []
    while (clients := next_clients(done, most)) is not None:
        assert len(done) < most_steps(most), "more steps than were announced"
        done.append(Point(clients, rate_of(clients)))
    return [point.clients for point in done]


def test_a_sweep_doubles_until_it_gains_nothing_and_then_looks_between():
    assert swept(lambda clients: min(clients, 16) * 100) == [1, 2, 4, 8, 16, 32, 64, 128, 12]
    assert swept(lambda clients: min(clients, 9) * 100) == [1, 2, 4, 8, 16, 32, 64, 128, 12, 10]
    assert swept(lambda _: 100) == [1, 2, 4, 8]  # one client is the knee, and nobody is between none and one
    assert swept(lambda clients: 100 / clients) == [1, 2, 4, 8]
    assert swept(lambda clients: clients, most=6) == [1, 2, 4, 6, 5]
    assert swept(lambda clients: clients, most=1) == [1]
    assert swept(lambda _: 0) == [1, 2, 4, 8]


def test_a_plateau_of_two_steps_is_no_end():
    rates = {1: 100, 2: 102, 4: 103, 8: 400, 16: 800}
    assert swept(lambda clients: rates.get(clients, 800))[:6] == [1, 2, 4, 8, 16, 32]


@given(st.integers(1, 4096), st.data())
def test_every_sweep_ends_within_its_announced_steps(most, data):
    asked = swept(lambda _: data.draw(st.floats(0, 1e6)), most)
    assert len(set(asked)) == len(asked)
    assert all(1 <= clients <= most for clients in asked)


# Numbers


def test_what_ends_outside_the_window_is_not_counted():
    tally = Tally(1_000, 2_000)
    assert tally.add(0, 999, None)
    assert tally.add(500, 1_000, None)
    assert tally.add(1_500, 1_999, "503: busy")
    assert not tally.add(1_900, 2_000, None)
    assert list(tally.latencies_ns) == [500]
    assert tally.errors == {"503: busy": 1}
    assert tally.requests_per_s == pytest.approx(1e6)


def test_kinds_of_error_are_bounded():
    tally = Tally(0, 10)
    for number in range(MOST_PROBLEMS + 5):
        tally.add(0, 1, f"problem {number}")
    tally.add(0, 1, "problem 0")
    assert len(tally.errors) == MOST_PROBLEMS + 1
    assert tally.errors["other problems"] == 5
    assert tally.errors["problem 0"] == 2
    assert tally.latencies() is None


@given(st.lists(st.integers(0, 10**12), min_size=1), st.sampled_from([0.5, 0.9, 0.99]))
def test_percentiles_agree_with_numpy(values, fraction):
    assert percentile(sorted(values), fraction) == np.percentile(values, fraction * 100, method="inverted_cdf")


# Inputs


def metadata(*inputs):
    return ModelMetadata("m", inputs=tuple(TensorMetadata(*one) for one in inputs))


def test_inputs_are_made_up_from_the_metadata():
    model = metadata(("x", "FP32", (-1, 3)), ("ids", "INT64", (-1, -1)), ("text", "BYTES", (1,)), ("on", "BOOL", ()))
    made = make_up(model, {"ids": (2, 7)}, rows=2)
    assert {name: array.shape for name, array in made.items()} == {"x": (2, 3), "ids": (2, 7), "text": (1,), "on": ()}
    assert made["x"].dtype == np.float32
    assert set(made["ids"].reshape(-1).tolist()) <= {0, 1}
    assert made["text"].tolist() == [b"headrace"]
    assert made["on"].dtype == np.bool_
    assert np.array_equal(made["x"], make_up(model, {}, rows=2)["x"])
    assert make_up(metadata(("x", "BF16", (4,))), {}, 1)["x"].dtype.name == "bfloat16"


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"y": (1,)}, "no such input; it has: x"),
        ({"x": (1,)}, r"\[1\] does not fit, the model takes \[-1, 3\]"),
        ({"x": (1, 4)}, "does not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, said):
    with pytest.raises(BadArgument, match=said):
        make_up(metadata(("x", "FP32", (-1, 3))), shapes, 1)


def test_shapes_are_read_or_refused():
    assert parse_shape("x", "1x32") == (1, 32)
    assert parse_shape("x", "7") == (7,)
    for wrong in ("", "x", "1x", "-1x2", "1,2", "1x2.5"):
        with pytest.raises(BadArgument, match="NAME=SIZExSIZE"):
            parse_shape("x", wrong)
    with pytest.raises(BadArgument, match="unknown datatype 'FP8'"):
        make_up(metadata(("x", "FP8", (1,))), {}, 1)


# What is shown


def step(clients, rate, share=0.2, batch=2.0, **errors):
    return Step(clients, rate, Latencies(1.0, 2.0, 3.5) if rate else None, batch, share, Counter(errors))


SWEEP = Protocol(
    "http", "http://127.0.0.1:8000", (step(1, 100.0), step(4, 400.0), step(8, 410.0), step(2, 200.0)), False
)


def test_the_table_is_in_order_and_marks_the_knee():
    lines = describe(SWEEP).splitlines()
    table = lines[1:6]
    assert [line.split()[0] for line in table] == ["clients", "1", "2", "4", "8"]
    assert [line for line in table if line.endswith("<- knee")] == [table[3]]
    assert table[3].split()[1:7] == ["400.0", "1.00", "2.00", "3.50", "2.0", "0"]
    bars = {line.split(" |")[0]: line.count("█") for line in lines if " |" in line}
    assert bars["8"] == 40
    assert bars["1"] == pytest.approx(10, abs=1)
    assert any(line.startswith("knee: 4 clients, 400.0 requests/s, p99 3.50 ms") for line in lines)
    assert "client took" not in describe(SWEEP)


def test_what_limits_the_numbers_is_said():
    steps = (step(1, 100.0), step(2, 200.0, share=0.97, batch=None, busy=3, late=5))
    text = describe(Protocol("grpc", "grpc://h:1", steps, cut_short=True))
    assert "the knee is the most that was tried" in text
    assert "--max-seconds" in text
    assert "this client took over 80% of a core" in text
    assert text.splitlines()[-2:] == ["5 x late", "3 x busy"]
    nothing = describe(Protocol("http", "http://h:1", (step(1, 0.0, refused=9),), cut_short=False))
    assert "nothing was answered" in nothing
    assert "9 x refused" in nothing
    one = Protocol("http", "http://h:1", (step(3, 50.0),), cut_short=False)
    assert one.answered
    assert "knee" not in describe(one)


def test_numbers_and_pictures_are_written(tmp_path):
    failed = Protocol("grpc", "grpc://h:1", (step(1, 0.0), step(2, 0.0)), cut_short=False)
    write_json(to_document("m", ["x FP32[1]"], [SWEEP, failed]), tmp_path / "numbers.json")
    document = json.loads((tmp_path / "numbers.json").read_text())
    assert [one["knee_clients"] for one in document["protocols"]] == [4, None]
    assert [one["clients"] for one in document["protocols"][0]["steps"]] == [1, 2, 4, 8]
    assert document["protocols"][0]["steps"][0]["p99_ms"] == 3.5
    assert document["protocols"][1]["steps"][0]["p99_ms"] is None
    draw("m", [SWEEP, failed], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# The command line


ARGUMENTS = BenchArguments(
    "m", None, None, None, (), (), (), 1, (), "", (1,), 256, Limits(0.0, 0.1, 1.0, 10.0), None, None
)


def test_an_address_that_is_given_is_the_only_one_asked():
    assert choose_addresses(ARGUMENTS) == {"http": "http://127.0.0.1:8000", "grpc": "grpc://127.0.0.1:8001"}
    assert choose_addresses(replace(ARGUMENTS, url="http://h:1")) == {"http": "http://h:1"}
    assert choose_addresses(replace(ARGUMENTS, grpc_url="grpc://h:1")) == {"grpc": "grpc://h:1"}
    both = replace(ARGUMENTS, url="http://h:1", grpc_url="grpc://h:2")
    assert choose_addresses(both) == {"http": "http://h:1", "grpc": "grpc://h:2"}
    assert choose_addresses(replace(both, protocols=("grpc",))) == {"grpc": "grpc://h:2"}
    with pytest.raises(BadArgument, match="--repository starts a server of its own"):
        choose_addresses(replace(both, repository=Path()))


async def told(arguments):
    """The exit status and what was said aside."""
    aside = []
    status = await run(
        arguments, lambda _: pytest.fail("there is nothing to report"), aside.append, show_progress=False
    )
    return status, "\n".join(aside)


async def test_mistakes_are_told_before_anything_is_measured(tmp_path, monkeypatch):
    for changes, said in (
        ({"url": "grpc://127.0.0.1:1"}, "--url is 'grpc://127.0.0.1:1', which is an address for grpc"),
        ({"url": "nonsense://x"}, "is no server's address"),
        ({"repository": tmp_path}, f"there is no model 'm' in {tmp_path}"),
        ({"json_file": tmp_path / "none" / "x.json"}, "--json .*: there is no folder"),
        ({"url": "http://127.0.0.1:1", "protocols": ("http",)}, "(?s)127.0.0.1:1: .*Is a server running there"),
    ):
        status, aside = await told(replace(ARGUMENTS, **changes))
        assert status == 1
        assert re.search(said, aside), aside
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    status, aside = await told(replace(ARGUMENTS, plot_file=tmp_path / "x.png"))
    assert (status, "pip install 'headrace[bench]'" in aside) == (1, True)


# Clients over HTTP, against servers that misbehave


async def asked(answer):
    """The tally of clients whose every request is given to ``answer``, with how many came before it."""
    for seconds in (0.25, 2.5, 25):
        tally, seen = await asked_for(seconds, answer)
        if seen > 20:
            return tally, seen
    raise AssertionError(f"only {seen} requests came")


async def asked_for(seconds, answer, clients=3):
    seen = 0

    async def serve(reader, writer):
        nonlocal seen
        try:
            while True:
                await reader.readexactly(len(REQUEST))
                seen += 1
                writer.write(answer(seen))
                if b"connection: close" in answer(seen):
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    address = Address("http", f"http://{host}:{port}", False, "")
    traffic = HttpTraffic(address, HttpRequest("POST", "/x", b"abc", {"a": "b"}))
    traffic._request = REQUEST
    now_ns = time.monotonic_ns()
    tally = Tally(now_ns, now_ns + int(seconds * 1e9))
    async with asyncio.timeout(60):
        await traffic.run(clients, tally)
    server.close()
    await server.wait_closed()
    return tally, seen


REQUEST = b"POST /x HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n"
GOOD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
BUSY = b'HTTP/1.1 503 Busy\r\ncontent-length: 16\r\n\r\n{"error":"busy"}'
LAST = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"


async def test_answers_of_every_form_are_counted():
    tally, seen = await asked(lambda number: CHUNKED if number % 2 else GOOD)
    assert tally.errors == {}
    assert seen - 3 <= len(tally.latencies_ns) <= seen


async def test_refusals_are_errors_with_the_servers_words():
    tally, _ = await asked(lambda number: GOOD if number % 2 else BUSY)
    assert set(tally.errors) == {"503: busy"}
    assert len(tally.latencies_ns) > 5


async def test_connections_that_end_are_made_again():
    tally, seen = await asked(lambda number: LAST if number % 3 == 0 else GOOD)
    assert tally.errors == {}
    assert seen > 6


async def test_nonsense_is_an_error_and_clients_go_on():
    tally, _ = await asked(lambda number: b"nonsense\r\n\r\n" if number == 2 else GOOD)
    (problem,) = tally.errors
    assert problem.startswith("not an HTTP response")
    assert len(tally.latencies_ns) > 5


def test_the_request_is_written_whole():
    address = Address("http", "http://user@host:8000/prefix", False, "")
    request = HttpRequest("POST", "/v2/models/m/infer", b"abc", {"content-type": "x"})
    traffic = HttpTraffic(address, request)
    assert traffic._request == (
        b"POST /prefix/v2/models/m/infer HTTP/1.1\r\nhost: host:8000\r\ncontent-type: x\r\ncontent-length: 3\r\n\r\nabc"
    )
