"""A model folder with an ``optimize`` block is dropped into a running server, and asked all the time until it is fast.

The optimiser beside the server gets idle CPU only, so that clients that never pause would make it starve. Right after
the model is ready a burst tells the throughput of the model as it was dropped in; then the clients are calm until the
plan is swapped in; a second burst tells what it has brought. Every answer is kept, and judged when all is over.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from headrace.core.cpus import usable_cpus
from headrace.optimizing import OptimizeArguments, job_of
from headrace_backends.optimize.calibration import read_examples
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.trial import Trial
from loadtests.answer import BadResponse, Outputs
from loadtests.http_client import get
from loadtests.metrics import labels
from loadtests.served_report import Served, Window, cut, failures, judge_answers, rates, timeline
from loadtests.served_traffic import Exchange, Row, Traffic
from loadtests.server import HOST, Server

READY_S = 180.0
LOOK_S = 0.5  # between two looks at what is served
ROWS = 64  # different requests
CLIENTS = 8  # for each of HTTP and gRPC
_REFERENCE_S = 600.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How long what takes. ``goal`` is the throughput after the swap over that before."""

    goal: float
    wait_s: float  # for the swap, at most
    warmup_s: float = 2.0
    part_s: float = 4.0  # of a burst
    parts: int = 3
    calm_s: float = 2.0  # before the first and after the last burst


FULL = Plan(goal=1.5, wait_s=1800.0)
QUICK = Plan(goal=1.0, wait_s=120.0, warmup_s=0.5, part_s=1.0, parts=2, calm_s=0.5)


@dataclass(frozen=True, slots=True)
class Right:
    """What is asked, what the model as it was dropped in answers, and what its owner allows."""

    rows: Sequence[Row]
    answers: Sequence[Outputs]
    goal: Goal
    backend: str


@dataclass(frozen=True, slots=True)
class Story:
    """What happened, in seconds of the monotonic clock."""

    exchanges: Sequence[Exchange]
    dropped_s: float
    ready_s: float
    before: Window
    swap_s: float | None
    after: Window | None
    form: str


def run(folder: Path, work: Path, plan: Plan, say: Say) -> Served:
    """Serve, drop the model's folder in, watch until it is served by a plan.

    Raises:
        ServerFailure: the server did not start or did not end well.
        RuntimeError: the model does not get ready.
    """
    say("  asking the model without a server")
    right = reference(folder, work)
    repository, plans = work / "served", work / "plans"
    repository.mkdir()
    with Server(repository, work / "server.log", ["--plan-cache", str(plans)]) as server:
        story = uvloop.run(_happen(folder, repository, server, right, plan, say))
        explained = _explain(folder.name, f"http://{HOST}:{server.http_port}")
    return tell(folder.name, story, right, plan, explained)


def reference(folder: Path, work: Path) -> Right:
    """The answers of the model as it was dropped in, in a process of its own, one request at a time."""
    job = job_of(OptimizeArguments(folder.name, folder.parent, work / "plans"))
    assert job.calibration is not None, "the cases have examples"
    subject = job.subject
    with Trial(work / "reference.log", usable_cpus()) as trial:
        source = subject.source(subject.reference, subject.path, usable_cpus())
        signature, _, _ = trial.load(subject.backend, source, _REFERENCE_S)
        rows = read_examples(job.calibration, signature).first(ROWS).inputs
        answers = trial.answer(rows, _REFERENCE_S)
    return Right(rows, answers, job.goal, subject.backend)


def tell(model: str, story: Story, right: Right, plan: Plan, explained: Sequence[str]) -> Served:
    """The story in numbers, and whether it is a good one."""
    exchanges, swap_s = story.exchanges, story.swap_s
    before = rates(exchanges, cut(story.before, plan.warmup_s, plan.parts))
    after = rates(exchanges, cut(story.after, plan.warmup_s, plan.parts)) if story.after else {}
    spans = {
        "before": [one for one in exchanges if one.answered_s < story.before.to_s],
        "meanwhile": [one for one in exchanges if story.before.to_s <= one.answered_s < (swap_s or float("inf"))],
        "after": [one for one in exchanges if swap_s is not None and one.answered_s >= swap_s],
    }
    missed, errors = [], {}
    for span, some in spans.items():
        found, wrong = judge_answers(some, right.answers, right.goal)
        if found is not None:
            errors[span] = found
        missed += [f"{span}: {problem}" for problem in wrong]
    failed = failures(exchanges)
    if failed:
        missed.append(f"{sum(failed.values())} of {len(exchanges)} requests failed")
    if swap_s is None:
        missed.append(f"no plan was swapped in within {plan.wait_s:.0f} s")
    elif sum(after.values()) < plan.goal * sum(before.values()):
        missed.append(
            f"{sum(after.values()):,.1f} requests/s after the swap and {sum(before.values()):,.1f} before, "
            f"the goal is {plan.goal:g} times as many"
        )
    if swap_s is not None and not any("plan" in line and "as fast" in line for line in explained):
        missed.append("headrace explain does not tell of the plan")
    return Served(
        model,
        story.ready_s - story.dropped_s,
        None if swap_s is None else swap_s - story.dropped_s,
        f"{right.backend}, as it was dropped in",
        story.form,
        before,
        after,
        len(exchanges),
        failed,
        errors,
        tuple(missed),
        tuple(explained),
        timeline(exchanges, story.dropped_s),
    )


async def _happen(folder: Path, repository: Path, server: Server, right: Right, plan: Plan, say: Say) -> Story:
    os.rename(folder, repository / folder.name)  # noqa: PTH104 - at once, so that no half of it is seen
    dropped_s = time.monotonic()
    await _until_ready(folder.name, server.http_port)
    ready_s = time.monotonic()
    say(f"  ready after {ready_s - dropped_s:.1f} s")
    traffic = Traffic(folder.name, right.rows, server.http_port, server.grpc_port, CLIENTS)
    traffic.start()
    try:
        burst_s = plan.warmup_s + plan.parts * plan.part_s
        await asyncio.sleep(plan.calm_s)
        before = Window(*await traffic.burst(burst_s))
        form = await _until_planned(folder.name, server.metrics_port, plan.wait_s)
        swap_s = time.monotonic() if form else None
        after = None
        if form:
            say(f"  a plan is served after {time.monotonic() - dropped_s:.0f} s: {form}")
            after = Window(*await traffic.burst(burst_s))
            await asyncio.sleep(plan.calm_s)
    finally:
        await traffic.stop()
    return Story(traffic.exchanges, dropped_s, ready_s, before, swap_s, after, form)


async def _until_ready(model: str, port: int) -> None:
    deadline = time.monotonic() + READY_S
    while (await get(HOST, port, f"/v2/models/{model}/ready")).status != 200:
        if time.monotonic() > deadline:
            answer = await get(HOST, port, f"/v2/models/{model}")
            raise RuntimeError(f"model '{model}' is not ready after {READY_S:.0f} s: {answer.body[:300]!r}")
        await asyncio.sleep(0.1)


async def _until_planned(model: str, port: int, wait_s: float) -> str:
    """The form of the plan by which the model is served; empty where none came in time, or none is to come."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        try:
            page = (await get(HOST, port, "/metrics")).body.decode()
        except BadResponse:
            page = ""
        if form := planned_form(page, model):
            return form
        await asyncio.sleep(LOOK_S)
    return ""


def planned_form(page: str, model: str) -> str:
    """By which plan the metrics say that a model is served; empty where it is by none."""
    return labels(page, "headrace_plan_info", model).get("form", "")


def _explain(model: str, url: str) -> list[str]:
    command = [sys.executable, "-m", "headrace", "explain", model, "--url", url]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return (ended.stdout + ended.stderr).splitlines()
