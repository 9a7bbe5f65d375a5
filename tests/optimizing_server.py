"""``headrace serve`` with ``fake_optimizer.py`` beside it instead of ``headrace optimize``; the flags are the same.

The folder OPTIMIZER_ORDERS has a file for each model whose run is to do something special; the runs are noted there.
"""

import os
import sys
from pathlib import Path

import typer
import uvloop

from headrace.app import serve
from headrace.cli import _from_settings
from headrace.log import set_up_logging

FAKE = Path(__file__).with_name("fake_optimizer.py")


def command(subject):
    """The fake's command line."""
    orders = Path(os.environ["OPTIMIZER_ORDERS"])
    order = orders / subject.model
    behaviour = order.read_text() if order.exists() else "succeed"
    return [sys.executable, str(FAKE), str(orders / "notes"), behaviour, subject.model]


def main(settings):
    """Serve."""
    set_up_logging(settings.log_format, settings.log_level, "front")
    uvloop.run(serve(settings, lambda line: print(line, flush=True), command))  # noqa: T201 - as the command does


if __name__ == "__main__":
    app = typer.Typer()
    app.command()(_from_settings(main))
    app()
