"""The log settings as requests read and change them."""

import logging

import pytest

from headrace.core.errors import InvalidRequest, Unsupported
from headrace.log import LogLevels, levels_from
from headrace.log_settings import LogSettings

DEFAULT = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


@pytest.fixture
def settings():
    """Those of a server with every default; the changes that are told are in ``settings.told``."""
    made = LogSettings(LogLevels(), json_lines=False)
    told = []
    made.on_change.append(told.append)
    made.told = told
    return made


def test_the_answer_has_every_setting(settings):
    assert settings.values() == DEFAULT


def test_the_start_values_are_those_of_the_flags():
    settings = LogSettings(levels_from("debug"), json_lines=True)
    assert settings.values() == DEFAULT | {"log_verbose_level": 1}
    settings = LogSettings(levels_from("error"), json_lines=False)
    assert settings.values() == DEFAULT | {"log_info": False, "log_warning": False}


@pytest.mark.parametrize(
    "change",
    [
        {"log_info": False},
        {"log_warning": False, "log_error": False},
        {"log_verbose_level": 2**32 - 1},
        {"log_format": "ISO8601"},
        {key: value for key, value in DEFAULT.items() if key != "log_file"} | {"log_verbose_level": 3},
    ],
)
def test_what_is_changed_is_told_and_the_rest_stays(settings, change):
    settings.change(change)
    assert settings.values() == DEFAULT | change
    assert settings.told == [settings.levels]
    assert settings.told[0].verbose_level == settings.values()["log_verbose_level"]
    settings.change({key: DEFAULT[key] for key in change})
    assert settings.values() == DEFAULT
    assert len(settings.told) == 2


@pytest.mark.parametrize("change", [{}, {"log_info": True}, {"log_file": None, "log_info": None, "log_format": None}])
def test_no_change_is_told_to_nobody(settings, change):
    settings.change(change)
    assert settings.values() == DEFAULT
    assert settings.told == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("log_info", 1),
        ("log_warning", "true"),
        ("log_error", []),
        ("log_verbose_level", -1),
        ("log_verbose_level", 2**32),
        ("log_verbose_level", True),
        ("log_verbose_level", 1.0),
        ("log_verbose_level", "1"),
        ("log_format", "iso8601"),
        ("log_format", 1),
        ("log_format", {"a": 1}),
        ("log_colour", True),
        ("", True),
    ],
)
def test_what_is_wrong_is_refused_by_its_name_and_changes_nothing(settings, key, value):
    with pytest.raises(InvalidRequest, match=f"'{key}'"):
        settings.change({"log_verbose_level": 1, "log_info": False} | {key: value})
    assert settings.values() == DEFAULT
    assert settings.told == []


def test_a_value_too_deep_to_be_shown_is_refused_all_the_same(settings):
    value = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(InvalidRequest, match="log_info"):
        settings.change({"log_info": value})
    while value:  # else taking it apart would go as deep
        value = value[0]


@pytest.mark.parametrize("value", ["", "/tmp/log", 1])
def test_the_log_file_cannot_be_set(settings, value):
    with pytest.raises(Unsupported, match="log_file"):
        settings.change({"log_info": False, "log_file": value})
    assert settings.values() == DEFAULT


def test_json_lines_keep_their_form():
    settings = LogSettings(LogLevels(), json_lines=True)
    settings.change({"log_format": "default", "log_info": False})
    with pytest.raises(Unsupported, match="log-format json"):
        settings.change({"log_format": "ISO8601"})
    assert settings.values() == DEFAULT | {"log_info": False}


def test_a_change_is_applied_to_this_process(settings, monkeypatch):
    applied = []
    monkeypatch.setattr("headrace.log_settings.apply", applied.append)
    settings.change({"log_verbose_level": 1})
    assert applied == [LogLevels(verbose_level=1)]
    assert applied[0].least == logging.DEBUG
