"""Flags and environment variables are the fields of Settings, no more and no less."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import typer
from typer.testing import CliRunner

from headrace.cli import _from_settings
from headrace.cli import app as whole
from headrace.config import Settings

FIELDS = dataclasses.fields(Settings)
OPTIONS = [one for one in FIELDS if one.name != "repository"]
REPEATABLE = [one for one in OPTIONS if get_origin(one.type) is tuple]


def flag(name):
    return "--" + name.replace("_", "-")


def variable(name):
    return "HEADRACE_" + name.upper()


@pytest.fixture
def parse(monkeypatch):
    """A function from arguments and variables to the Settings that they make, or the message of the refusal."""
    for one in FIELDS:
        monkeypatch.delenv(variable(one.name), raising=False)
    made = []
    app = typer.Typer()

    def command(settings):
        """Keep them."""
        made.append(settings)

    app.command()(_from_settings(command))

    def parse(*arguments, **variables):
        result = CliRunner().invoke(app, list(arguments), env=variables)
        if result.exit_code:
            assert result.exit_code == 2, result.output
            return re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)
        return made.pop()

    return parse


def another(field):
    """A value other than the default, as text and as what it is read as."""
    default = field.default
    if field.type is bool:
        return None, True
    if field.type is Path:
        return "/models", Path("/models")
    if get_origin(field.type) is Literal:
        value = next(it for it in get_args(field.type) if it != default)
        return value, value
    if field.type in (int, float):
        value = field.type(max(default, 0) // 2 + 2048 if field.type is int else default + 1.5)
        value = min(value, field.metadata.get("max", value))
        return str(value), value
    return "else", "else"


def test_without_arguments_all_is_as_it_says_in_the_file(parse):
    assert parse() == Settings()


@pytest.mark.parametrize("field", [one for one in OPTIONS if one not in REPEATABLE], ids=lambda it: it.name)
def test_every_option_is_a_flag_and_a_variable(parse, field):
    text, value = another(field)
    assert value != field.default
    expected = dataclasses.replace(Settings(), **{field.name: value})
    assert parse(flag(field.name), *([] if text is None else [text])) == expected
    assert parse(**{variable(field.name): text or "1"}) == expected


def test_the_repository_is_the_argument_and_a_variable(parse):
    assert parse("/models").repository == Path("/models")
    assert parse(HEADRACE_REPOSITORY="/models").repository == Path("/models")


def test_a_flag_wins_over_its_variable(parse):
    assert parse("--http-port", "1", HEADRACE_HTTP_PORT="2", HEADRACE_GRPC_PORT="3").http_port == 1
    assert parse("/flag", HEADRACE_REPOSITORY="/variable").repository == Path("/flag")


@pytest.mark.parametrize("field", REPEATABLE, ids=lambda it: it.name)
def test_options_that_may_be_repeated_add_up(parse, field):
    assert parse(flag(field.name), "a", flag(field.name), "b c") == dataclasses.replace(
        Settings(), **{field.name: ("a", "b c")}
    )
    assert getattr(parse(**{variable(field.name): "a b"}), field.name) == ("a", "b")


def test_the_lists_are_these():
    assert {one.name for one in REPEATABLE} == {"load_model", "rate_limit_resource", "restricted_api", "trace_level"}


@pytest.mark.parametrize("field", [one for one in FIELDS if "min" in one.metadata], ids=lambda it: it.name)
def test_values_out_of_bounds_are_refused_with_the_bounds(parse, field):
    below = field.metadata["min"] - 1
    for message in (parse(flag(field.name), str(below)), parse(**{variable(field.name): str(below)})):
        assert isinstance(message, str), "it was taken"
        assert flag(field.name) in message
        assert str(field.metadata["min"]) in message
    assert parse(flag(field.name), str(field.metadata["min"]))
    if "max" in field.metadata:
        message = parse(flag(field.name), str(field.metadata["max"] + 1))
        assert isinstance(message, str), "it was taken"
        assert str(field.metadata["max"]) in message


@pytest.mark.parametrize(
    "arguments", [["--http-port", "many"], ["--model-control", "sometimes"], ["--drain-timeout", ""], ["--no-such"]]
)
def test_what_is_no_value_of_an_option_is_refused(parse, arguments):
    assert isinstance(parse(*arguments), str)


def test_help_tells_of_every_option_with_its_variable():
    result = CliRunner().invoke(whole, ["serve", "--help"], env={"COLUMNS": "240", "TERM": "dumb", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for one in OPTIONS:
        assert flag(one.name) in result.output
    for one in FIELDS:
        assert variable(one.name) in result.output


def test_the_contracts_flags_are_there():
    names = {one.name for one in FIELDS}
    assert {"host", "http_port", "grpc_port", "metrics_port", "model_control", "load_model", "log_format"} <= names
    assert {"drain_timeout", "strict_readiness"} <= names
    defaults = Settings()
    assert (defaults.http_port, defaults.grpc_port, defaults.metrics_port) == (8000, 8001, 8002)
    assert defaults.host == "127.0.0.1", "nobody else gets in unasked"


def test_every_option_says_what_it_is_for():
    for one in FIELDS:
        assert one.metadata["help"].endswith("."), one.name
        assert one.default is not dataclasses.MISSING


def test_settings_cannot_be_changed_or_misspelt():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().host = "0.0.0.0"
    with pytest.raises(TypeError):
        Settings(htp_port=1)


def test_the_command_keeps_its_help():
    def command(settings):
        """Say something."""

    made = _from_settings(command)
    assert made.__doc__ == "Say something."
    assert list(inspect.signature(made).parameters) == [one.name for one in FIELDS]
