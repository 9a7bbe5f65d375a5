"""The same work without a server: a backend's own loop, and PyTorch in eager mode, to measure the served forms by."""

import time
from pathlib import Path

import torch

from headrace_backends.base import Backend, ModelSource
from headrace_backends.registry import resolve
from loadtests.gpu.forms import Form
from loadtests.gpu.subjects import MAX_ROWS, Subject, make_network

_ROTATION = 4  # inputs that take turns, so that nothing is answered from a cache


def load(form: Form, subject: Subject, files: Path) -> Backend:
    """One form in this process."""
    parameters = dict(form.parameters)
    if form.backend == "tensorrt":
        parameters |= subject.shapes
    source = ModelSource(
        subject.name,
        "1",
        files / form.file,
        device=form.device,
        threads=4,
        max_batch_size=MAX_ROWS,
        parameters=parameters,
    )
    return resolve(form.backend).load(source)


def rows_per_s(backend: Backend, subject: Subject, rows: int, seconds: float) -> float:
    """How many rows a loop of ``execute`` gets through, copies there and back included."""
    inputs = [subject.inputs(rows, seed) for seed in range(_ROTATION)]
    for _ in range(3):
        for one in inputs:
            backend.execute(one, ())
    done, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        backend.execute(inputs[done % _ROTATION], ())
        done += 1
    return done * rows / (time.monotonic() - started)


def eager_ms(subject: Subject, rows: int, seconds: float) -> float:
    """The median of PyTorch eager fp32 (no TF32) on inputs that lie on the GPU already, by CUDA events."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    network = make_network(subject).cuda()
    inputs = [
        [torch.from_numpy(array).cuda() for array in subject.inputs(rows, seed).values()] for seed in range(_ROTATION)
    ]
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(10):
            network(*inputs[0])
        torch.cuda.synchronize()
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            network(*inputs[len(times) % _ROTATION])
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    del network, inputs
    torch.cuda.empty_cache()
    return sorted(times)[len(times) // 2]
