"""The optimiser's load test from its command line: the cheapest case, with little time."""

import json
import sys

from loadtests import optimize
from typer.testing import CliRunner


def test_a_quick_case_leaves_its_result_and_a_picture(tmp_path, monkeypatch):
    import typer

    monkeypatch.setattr(optimize, "RESULTS", tmp_path)
    monkeypatch.setattr(optimize, "QUICK_S", 3)
    monkeypatch.setattr(sys, "argv", ["optimize"])
    app = typer.Typer()
    app.command()(optimize.main)
    ended = CliRunner().invoke(app, ["--quick", "--case", "magika", "--name", "smoke"])
    assert ended.exit_code == 0, ended.output
    told = json.loads((tmp_path / "smoke.json").read_text())
    assert [one["case"] for one in told["cases"]] == ["magika"]
    assert told["failures"] == {}
    assert any(row["fate"] == "chosen" for row in told["candidates"]["magika"])
    assert (tmp_path / "smoke.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_case_is_refused_with_the_names_of_those_that_there_are():
    import typer

    app = typer.Typer()
    app.command()(optimize.main)
    ended = CliRunner().invoke(app, ["--case", "nothing"])
    assert ended.exit_code == 1
    assert "no case nothing" in ended.output
    assert "served" in ended.output
