"""The server's settings, one line an option: flags, HEADRACE_* variables and their help derive from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from headrace_backends.optimize.plan_cache import default_plan_cache

# The groups of options in the help, in the order in which they are shown.
LISTENING = "Listening"
MODELS = "Models"
REQUESTS = "Requests and their limits"
API = "What clients may use"
CACHE = "Response cache"
RESOURCES = "Resources that models share"
MEMORY = "Memory"
OBSERVING = "Logs, metrics and traces"
OPTIMIZER = "Optimised models"


def _option(group: str, default: Any, help_text: str, **bounds: float) -> Any:
    return field(default=default, metadata={"help": help_text, "rich_help_panel": group, **bounds})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server runs. Sizes in bytes, times in seconds."""

    repository: Path = _option(MODELS, Path("model_repository"), "The folder that holds the models.")

    host: str = _option(LISTENING, "127.0.0.1", "Address to listen on; 0.0.0.0 for every interface.")
    http_port: int = _option(LISTENING, 8000, "HTTP port; 0 picks a free one.", min=0, max=65535)
    grpc_port: int = _option(LISTENING, 8001, "gRPC port; 0 picks a free one.", min=0, max=65535)
    metrics_port: int = _option(
        LISTENING, 8002, "Port for /metrics and nothing else; 0 picks a free one.", min=0, max=65535
    )
    server_name: str = _option(
        LISTENING, "headrace", "The server's name in its metadata; some of Triton's tools expect 'triton'."
    )

    model_control: Literal["poll", "explicit", "none"] = _option(
        MODELS,
        "poll",
        "poll: load what is in the folder and follow its changes. explicit: load and unload by request. "
        "none: load what is in the folder at start, and change nothing later.",
    )
    load_model: tuple[str, ...] = _option(
        MODELS, (), "With --model-control explicit: a model to load at start, * for all; may be repeated."
    )
    strict_readiness: bool = _option(
        MODELS, False, "Be ready only while every model serves. Otherwise a model that cannot be loaded does not count."
    )
    load_timeout: float = _option(
        MODELS, 600.0, "Seconds that a model may take to load; then its worker is killed and the load fails.", min=1
    )
    max_own_workers: int = _option(
        MODELS,
        8,
        "Number of model instances with a worker process of their own. Small ONNX, OpenVINO, TensorFlow Lite and ncnn "
        "models beyond it share processes.",
        min=0,
    )
    max_shared_workers: int = _option(MODELS, 8, "Number of worker processes that small models share.", min=1)

    max_request_bytes: int = _option(
        REQUESTS, 64 * 1024 * 1024, "Largest HTTP request body, also after decompression.", min=1024
    )
    max_grpc_bytes: int = _option(REQUESTS, -1, "Largest gRPC message; -1: no limit.", min=-1)
    max_inflight_bytes: int = _option(
        REQUESTS,
        1024 * 1024 * 1024,
        "Bytes of accepted requests that wait for their answers, and of requests that are still arriving; beyond it, "
        "large requests are refused (503).",
        min=1024,
    )
    read_timeout: float = _option(REQUESTS, 60.0, "Seconds that a client may take to send one HTTP request.", min=1)
    drain_timeout: float = _option(
        REQUESTS, 30.0, "Seconds that accepted requests have to finish after SIGTERM or Ctrl-C.", min=0
    )
    grpc_compression: Literal["none", "deflate", "gzip"] = _option(REQUESTS, "none", "Compression of gRPC responses.")

    allow_client_shm: bool = _option(
        API, False, "Let clients on this machine pass tensors in shared memory. Only where every client is trusted."
    )
    allow_recording: bool = _option(API, False, "Let clients have the inputs of a model recorded, for the optimiser.")
    recording_bytes: int = _option(API, 256 * 1024 * 1024, "Memory for the inputs of one recording.", min=1024)
    forward_headers: str = _option(
        API, "", "Regular expression: headers whose whole lower-case name matches become request parameters."
    )
    restricted_api: tuple[str, ...] = _option(
        API, (), "GROUP[,GROUP...]:HEADER=VALUE: only requests with that header may use these APIs; may be repeated."
    )

    cache_bytes: int = _option(
        CACHE, 64 * 1024 * 1024, "Memory for the answers of models with response_cache: true; 0: no cache.", min=0
    )
    cache_redis: str = _option(CACHE, "", "URL of a Redis that keeps these answers in place of the server's memory.")

    rate_limit: Literal["off", "execution_count"] = _option(
        RESOURCES,
        "off",
        "execution_count: an instance runs only while the resources that its configuration asks for are free.",
    )
    rate_limit_resource: tuple[str, ...] = _option(
        RESOURCES,
        (),
        "NAME:COUNT[:DEVICE]: how much there is of a resource, on a GPU (its number) or cpu; may be repeated.",
    )

    resident_bytes: int = _option(
        MEMORY,
        0,
        "Memory that all models may take together. When it is full, the models used longest ago are unloaded, and "
        "loaded again at their next request. 0: no limit.",
        min=0,
    )
    gpu_memory_bytes: int = _option(
        MEMORY, 0, "Bytes of each GPU that all models may take together; a model beyond it is refused. 0: all.", min=0
    )
    gpu_memory_fraction: float = _option(
        MEMORY,
        0.0,
        "The same as a share of the GPU's memory, such as 0.9; the smaller of both counts. 0: all.",
        min=0,
        max=1,
    )
    worker_memory_growth: float = _option(
        MEMORY,
        0.0,
        "Replace a worker whose memory has grown to this many times what it was at first, such as 1.5. 0: never.",
        min=0,
    )
    worker_memory_growth_bytes: int = _option(
        MEMORY, 64 * 1024 * 1024, "With --worker-memory-growth: the least growth, in bytes, that counts.", min=0
    )
    worker_memory_limit: int = _option(
        MEMORY, 0, "Replace a worker that holds more bytes than this. 0: no limit.", min=0
    )
    recycle_interval: float = _option(MEMORY, 60.0, "Least seconds between two replacements for growth.", min=0.1)
    recycle_grace: float = _option(
        MEMORY, 300.0, "Seconds that sequences and streams of a replaced worker have to end.", min=0
    )

    log_format: Literal["text", "json"] = _option(OBSERVING, "text", "Form of the log lines on standard error.")
    log_level: Literal["debug", "info", "warning", "error"] = _option(
        OBSERVING, "info", "Log lines of this level and the more severe ones."
    )
    summary_metrics: bool = _option(
        OBSERVING, False, "Also export Triton's summaries, nv_*_summary_*: quantiles of the last minute."
    )
    trace_file: str = _option(OBSERVING, "", "File to write traces of requests to; without it nothing is traced.")
    trace_level: tuple[str, ...] = _option(
        OBSERVING, (), "TIMESTAMPS or TENSORS: trace these from the start; may be repeated. Needs --trace-file."
    )
    trace_rate: int = _option(OBSERVING, 1000, "Trace one in so many requests of a model.", min=1, max=2**32 - 1)
    trace_count: int = _option(OBSERVING, -1, "Stop after so many traces; -1: never.", min=-1, max=2**31 - 1)

    optimize: Literal["background", "plans", "off"] = _option(
        OPTIMIZER,
        "background",
        "background: optimise models whose configuration asks for it, while the CPU is idle. "
        "plans: only use plans that were made before. off: serve every model from its own file.",
    )
    optimize_time_limit: float = _option(
        OPTIMIZER, 3600.0, "Seconds after which a run in the background is stopped; the next one continues it.", min=1
    )
    plan_cache: Path = _option(
        OPTIMIZER, default_plan_cache(), "The folder that holds plans, the results of the optimiser, and recordings."
    )
    drift_interval: float = _option(
        OPTIMIZER,
        300.0,
        "An optimised model without requests for so many seconds checks its answers to recorded requests. 0: never.",
        min=0,
    )
