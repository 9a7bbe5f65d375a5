"""PyTorch in eager mode, fp32 without TF32: what the forms are measured by. It needs PyTorch and a GPU."""

import time
from statistics import median

import torch

from loadtests.gpu.bare import calls_per_s
from loadtests.gpu.export import make_network
from loadtests.gpu.subjects import Subject

_ROTATION = 4


def measure(subject: Subject, rows: int, seconds: float) -> dict[str, float]:
    """``ms``: the median of a batch that is on the GPU already, by CUDA events; ``rows_per_s``: with copies."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    network = make_network(subject).cuda()
    arrays = [[torch.from_numpy(one) for one in subject.inputs(rows, seed).values()] for seed in range(_ROTATION)]
    with torch.inference_mode():
        there = [[tensor.cuda() for tensor in one] for one in arrays]
        for turn in range(10):
            network(*there[turn % _ROTATION])
        times: list[float] = []
        ends = time.monotonic() + seconds
        while not times or time.monotonic() < ends:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            network(*there[len(times) % _ROTATION])
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))

        def call(turn: int) -> object:
            answer = network(*(tensor.cuda() for tensor in arrays[turn % _ROTATION]))
            return answer.cpu().numpy()

        rate = rows * calls_per_s(call, seconds)
    return {"ms": median(times), "rows_per_s": rate}
