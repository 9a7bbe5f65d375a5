"""Which records are written, and how their lines look."""

import json
import logging
import re

import msgspec
import pytest

from headrace import log
from headrace.log import LogLevels, levels_from

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


@pytest.fixture
def written(capsys):
    """A function that gives what was logged since it was last called; the loggers are put back afterwards."""
    loggers = [logging.getLogger(name) for name in (None, *log._NOISY)]
    handlers, levels = loggers[0].handlers[:], [one.level for one in loggers]
    yield lambda: capsys.readouterr().err
    loggers[0].handlers[:] = handlers
    for one, level in zip(loggers, levels, strict=True):
        one.setLevel(level)


def say_all():
    for name, level in LEVELS.items():
        logging.getLogger("headrace.test").log(level, "this is %s", name)


def said(text):
    return re.findall(r"this is (\w+)", text)


@pytest.mark.parametrize("least", ["debug", "info", "warning", "error"])
def test_a_level_and_all_above_it_are_written(written, least):
    log.set_up_logging("text", least, "front")
    say_all()
    assert said(written()) == [name for name in LEVELS if LEVELS[name] >= LEVELS[least]]


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (LogLevels(info=False), ["warning", "error", "critical"]),
        (LogLevels(warning=False), ["info", "error", "critical"]),
        (LogLevels(error=False), ["info", "warning"]),
        (LogLevels(info=False, warning=False, error=False), []),
        (LogLevels(info=False, warning=False, error=False, verbose_level=3), ["debug"]),
        (LogLevels(verbose_level=1), list(LEVELS)),
    ],
)
def test_each_level_is_switched_by_itself_and_at_once(written, log_format, levels, expected):
    log.set_up_logging(log_format, "info", "front")
    log.apply(levels)
    say_all()
    assert said(written()) == expected
    log.apply(LogLevels())
    say_all()
    assert said(written()) == ["info", "warning", "error", "critical"]


def test_what_nobody_wants_costs_no_record(written):
    log.set_up_logging("text", "info", "front")
    assert not logging.getLogger("headrace.test").isEnabledFor(logging.DEBUG)
    log.apply(LogLevels(verbose_level=1))
    assert logging.getLogger("headrace.test").isEnabledFor(logging.DEBUG)
    log.apply(LogLevels(info=False, warning=False, error=False))
    assert not logging.getLogger("headrace.test").isEnabledFor(logging.CRITICAL)


@pytest.mark.parametrize("level", ["debug", "info", "error"])
def test_chatty_libraries_are_kept_to_warnings(written, level):
    log.set_up_logging("text", level, "front")
    logging.getLogger("asyncio").info("slow callback")
    assert written() == ""
    logging.getLogger("asyncio").warning("very slow callback")
    assert ("very slow callback" in written()) is (level != "error")


def test_times_are_short_or_iso8601(written):
    log.set_up_logging("text", "info", "worker %1")
    logging.getLogger("x").info("hello %s", "you")
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} INFO worker %1: hello you\n", written())
    log.apply(LogLevels(iso8601=True))
    record = logging.makeLogRecord({"levelno": 20, "levelname": "INFO", "msg": "hello", "created": 86400.5})
    logging.getLogger().handle(record)
    assert written() == "1970-01-02T00:00:00.500Z INFO worker %1: hello\n"
    log.apply(LogLevels())
    logging.getLogger("x").info("hello")
    assert re.match(r"\d\d:\d\d:\d\d\.\d{3} INFO", written())


def test_json_stays_json(written):
    log.set_up_logging("json", "info", "front")
    log.apply(LogLevels(iso8601=True, verbose_level=1))
    logging.getLogger("x").debug("hello")
    line = json.loads(written())
    assert (line["level"], line["process"], line["logger"], line["message"]) == ("debug", "front", "x", "hello")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_failure_comes_with_its_stack(written, log_format):
    log.set_up_logging(log_format, "info", "front")
    try:
        {}["no such thing"]
    except KeyError:
        logging.getLogger("x").exception("failed")
    text = written()
    assert "Traceback" in text
    assert "KeyError: 'no such thing'" in text
    assert log_format == "text" or "Traceback" in json.loads(text)["exception"]


def test_levels_travel_to_the_workers():
    levels = LogLevels(info=False, verbose_level=2, iso8601=True)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(levels), type=LogLevels) == levels


def test_nothing_is_changed_in_a_process_that_logs_in_another_way(written):
    logging.getLogger().handlers[:] = [logging.NullHandler()]
    level = logging.getLogger().level
    log.apply(LogLevels(verbose_level=1))
    assert logging.getLogger().level == level


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("debug", LogLevels(verbose_level=1)),
        ("info", LogLevels()),
        ("warning", LogLevels(info=False)),
        ("error", LogLevels(info=False, warning=False)),
    ],
)
def test_the_flag_gives_the_levels_at_start(name, levels):
    assert levels_from(name) == levels
