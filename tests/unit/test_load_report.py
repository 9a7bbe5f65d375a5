"""The load in a response header."""

import json
from math import inf, nan

import pytest

from headrace.frontends.load_report import LoadReport, LoadSample


class Clock:
    """A clock that is set by hand, and a reading that counts."""

    def __init__(self):
        self.now = 1000.0
        self.reads = 0

    def read(self):
        self.reads += 1
        return LoadSample(0.3, 0.25, {"queue_requests": self.reads, "share": 1 / 3})

    def report(self):
        return LoadReport(self.read, lambda: self.now)


def test_the_two_forms():
    report = Clock().report()
    assert report.header("text") == (
        "TEXT cpu_utilization=0.3, mem_utilization=0.25, named_metrics.queue_requests=1, named_metrics.share=0.3333"
    )
    form, _, document = report.header("json").partition(" ")
    assert form == "JSON"
    assert json.loads(document) == {
        "cpu_utilization": 0.3,
        "mem_utilization": 0.25,
        "named_metrics": {"queue_requests": 1, "share": 0.3333},
    }


@pytest.mark.parametrize("wanted", ["TEXT", " text ", "Json"])
def test_a_form_is_known_however_it_is_written(wanted):
    header = Clock().report().header(wanted)
    assert header.startswith(wanted.strip().upper() + " ")


@pytest.mark.parametrize("wanted", ["", "bin", "text,json", "\u00e4", "text\x00"])
def test_of_another_form_there_is_none(wanted):
    assert Clock().report().header(wanted) is None


def test_the_load_is_read_ten_times_a_second_at_most():
    clock = Clock()
    report = clock.report()
    assert clock.reads == 0
    for step in range(200):
        clock.now = 1000 + step / 100
        report.header("text" if step % 2 else "json")
        report.header("none")
    assert 19 <= clock.reads <= 20
    clock.now += 60
    assert f"queue_requests={clock.reads + 1}," in report.header("text")


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_what_could_not_be_read_is_left_out(value):
    report = LoadReport(lambda: LoadSample(value, 1.0, {"queue_requests": value}))
    assert report.header("text") == "TEXT mem_utilization=1"
    assert json.loads(report.header("json")[5:]) == {"mem_utilization": 1, "named_metrics": {}}


def test_a_header_is_one_line_of_ascii_whatever_the_numbers():
    report = LoadReport(lambda: LoadSample(1e-9, 0.99999, {"big": 1e20, "none": 0}))
    for wanted in ("text", "json"):
        header = report.header(wanted)
        assert header.isascii()
        assert header.isprintable()
    assert json.loads(report.header("json")[5:])["named_metrics"] == {"big": 1e20, "none": 0}
    assert report.header("text").startswith("TEXT cpu_utilization=0, mem_utilization=1, ")
