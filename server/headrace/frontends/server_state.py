"""What the server says of itself: its name, what it offers, and whether it is ready."""

from headrace.repository.repository import Repository

_EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "generate",
    "logging",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "sequence",
    "statistics",
    "system_shared_memory",
    "trace",
)


class ServerState:
    """Health, as both front ends report it."""

    def __init__(
        self, name: str, repository: Repository, *, strict_readiness: bool, shares_gpu_memory: bool = False
    ) -> None:
        self.name = name
        self.extensions = sorted((*_EXTENSIONS, "cuda_shared_memory")) if shares_gpu_memory else list(_EXTENSIONS)
        self.stopping = False
        self._repository = repository
        self._strict = strict_readiness

    def why_not_ready(self) -> str:
        """Empty when the server is ready, else the reason why not."""
        if self.stopping:
            return "the server is stopping"
        if not self._repository.settled:
            return "the server is loading its models"
        if self._strict:
            waiting = self._repository.unready()
            if waiting:
                return f"not ready (--strict-readiness): {', '.join(waiting)}"
        return ""
