"""The server's settings, one line an option: flags, HEADRACE_* variables and their help derive from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from headrace_backends.optimize.plan_cache import default_plan_cache


def _option(default: Any, help_text: str, **bounds: float) -> Any:
    return field(default=default, metadata={"help": help_text, **bounds})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server runs. Sizes in bytes, times in seconds."""

    repository: Path = _option(Path("model_repository"), "The folder that holds the models.")
    host: str = _option("127.0.0.1", "Address to listen on; 0.0.0.0 for every interface.")
    http_port: int = _option(8000, "HTTP port; 0 picks a free one.", min=0, max=65535)
    grpc_port: int = _option(8001, "gRPC port; 0 picks a free one.", min=0, max=65535)
    metrics_port: int = _option(8002, "Port of /metrics alone; 0 picks a free one.", min=0, max=65535)
    model_control: Literal["poll", "explicit", "none"] = _option(
        "poll",
        "poll: follow the folder. explicit: load and unload by request. none: what is there at start, and no more.",
    )
    load_model: tuple[str, ...] = _option(
        (), "With explicit control: a model to load at start; may be repeated, * for all."
    )
    strict_readiness: bool = _option(False, "Be ready only while every model is, not once each was loaded or refused.")
    log_format: Literal["text", "json"] = _option("text", "Form of the log lines on standard error.")
    log_level: Literal["debug", "info", "warning", "error"] = _option("info", "The least level that is logged.")
    drain_timeout: float = _option(30.0, "Seconds that accepted requests have to finish after SIGTERM.", min=0)
    load_timeout: float = _option(600.0, "Seconds that a model may take to load before its worker is killed.", min=1)
    max_request_bytes: int = _option(64 * 1024 * 1024, "Largest HTTP request body, also after decompression.", min=1024)
    max_grpc_bytes: int = _option(-1, "Largest gRPC message; -1 for no bound.", min=-1)
    max_inflight_bytes: int = _option(
        1024 * 1024 * 1024, "Bytes of accepted, unanswered requests above which more are refused.", min=1024
    )
    max_own_workers: int = _option(
        8, "Instances with a worker process of their own; small ONNX models past that share processes.", min=0
    )
    summary_metrics: bool = _option(
        False, "Also export Triton's summaries, nv_*_summary_*: quantiles of the last minute."
    )
    max_shared_workers: int = _option(8, "Worker processes that are shared.", min=1)
    resident_bytes: int = _option(
        0, "Memory for models: those used longest ago leave it, and come back when they are asked; 0: no bound.", min=0
    )
    gpu_memory_bytes: int = _option(
        0, "Memory of each GPU that models may have together; one for which there is no room is refused; 0: all.", min=0
    )
    gpu_memory_fraction: float = _option(
        0.0, "The same as a share of each GPU's memory, as 0.9; the smaller of both counts; 0: all.", min=0, max=1
    )
    worker_memory_growth: float = _option(
        0.0, "Replace a worker whose memory has grown to so many times what it was at first; 0: never.", min=0
    )
    worker_memory_growth_bytes: int = _option(
        64 * 1024 * 1024, "A worker that has grown by less is not replaced for growth.", min=0
    )
    worker_memory_limit: int = _option(0, "Replace a worker that holds more bytes than this; 0: no bound.", min=0)
    recycle_interval: float = _option(60.0, "Seconds between two replacements of workers for growth.", min=0.1)
    recycle_grace: float = _option(
        300.0, "Seconds that sequences and streams of a replaced worker have to end by themselves.", min=0
    )
    rate_limit: Literal["off", "execution_count"] = _option(
        "off", "execution_count: instances run only with the resources that their configuration asks for."
    )
    rate_limit_resource: tuple[str, ...] = _option(
        (), "NAME:COUNT[:DEVICE]: how much there is of a resource, on a GPU (its number) or cpu; may be repeated."
    )
    read_timeout: float = _option(60.0, "Seconds that a client may take to send one HTTP request.", min=1)
    cache_bytes: int = _option(
        64 * 1024 * 1024, "Memory for the responses of models that have a response cache.", min=0
    )
    cache_redis: str = _option("", "URL of a Redis that keeps those responses instead of this process's memory.")
    allow_client_shm: bool = _option(False, "Let clients register shared memory to read inputs from and write to.")
    optimize_time_limit: float = _option(
        3600.0, "Seconds after which a run of the optimiser in the background is stopped; it goes on later.", min=1
    )
    allow_recording: bool = _option(False, "Let clients have inputs of a model recorded, in the plan cache.")
    recording_bytes: int = _option(256 * 1024 * 1024, "Memory for the inputs of one recording.", min=1024)
    forward_headers: str = _option(
        "", "Regular expression; headers whose lower-case names match it whole become request parameters."
    )
    restricted_api: tuple[str, ...] = _option(
        (), "GROUP[,GROUP...]:HEADER=VALUE: only requests with that header may use these APIs; may be repeated."
    )
    trace_file: str = _option("", "The file that traces of requests are written to.")
    trace_level: tuple[str, ...] = _option(
        (), "TIMESTAMPS or TENSORS: what is traced at first; may be repeated. Needs --trace-file."
    )
    trace_rate: int = _option(1000, "One in so many requests of a model is traced.", min=1, max=2**32 - 1)
    trace_count: int = _option(-1, "Traces to make; -1 for no end of them.", min=-1, max=2**31 - 1)
    optimize: Literal["background", "plans", "off"] = _option(
        "background",
        "background: optimise models whose configuration asks for it while the CPU is idle. "
        "plans: only use plans that were made before. off: serve every model as it was dropped in.",
    )
    plan_cache: Path = _option(default_plan_cache(), "The folder that holds the plans of optimised models.")
    drift_interval: float = _option(
        300.0,
        "Seconds without a request after which an optimised model answers its recorded requests again; 0: never.",
        min=0,
    )
    grpc_compression: Literal["none", "deflate", "gzip"] = _option("none", "Compression of gRPC responses.")
    server_name: str = _option("headrace", "Name in the server's metadata; some clients check for 'triton'.")
