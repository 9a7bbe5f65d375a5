"""The environment variables of a process that runs models, whoever starts it."""

import os

# glibc gives large blocks back to the system with each free and faults them in again with each allocation, until it
# has adapted: decoding a picture of 600 kB took a worker 4.5 ms of CPU instead of 3.1 ms (loadtests/pipeline.py).
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 * 1024 * 1024), "MALLOC_TRIM_THRESHOLD_": str(64 * 1024 * 1024)}
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def model_environment(*, shared: bool, threads: int, visible_gpus: str | None = None) -> dict[str, str]:
    """This process's own variables, and what a process that hosts models on ``threads`` threads needs on top.

    A ``shared`` one holds many small models: what one of them frees is better given back. ``visible_gpus`` are those
    that it sees alone (``device.visible_gpus``), None for those that this process sees.
    """
    gpus = {} if visible_gpus is None else {"CUDA_VISIBLE_DEVICES": visible_gpus}
    return {**({} if shared else _MALLOC), **os.environ, **dict.fromkeys(_THREADS, str(threads)), **gpus}
