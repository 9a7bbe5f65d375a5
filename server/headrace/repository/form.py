"""What a version is run as, by a plan or as it was dropped in: what each of its instances loads, and what it needs."""

from collections.abc import Callable

from headrace.repository.declared import config_json, declared_signature, reshapes
from headrace.repository.layout import ModelFolder, VersionFiles
from headrace.repository.model_config import InstanceConfig, ModelConfig
from headrace.repository.planned import Planned, device_for
from headrace.workers.cpus import threads_for
from headrace.workers.frames import Load, Loaded
from headrace.workers.placement import Needs
from headrace.workers.resources import GLOBAL
from headrace_backends.registry import SHAREABLE


class ServedForm:
    """``planned`` is None for the model as it was dropped in. Clients are told of ``files`` whatever is run.

    ``config`` is what it is run by; ``print`` changes when it has to be loaded anew.
    """

    def __init__(self, folder: ModelFolder, files: VersionFiles, planned: Planned | None) -> None:
        self._planned = planned
        self.config: ModelConfig = planned.config if planned is not None else folder.config
        self.print = version_print(folder, files.version) + (f"/{planned.print}" if planned is not None else "")
        self._folder = folder
        self._files = files
        self._run_files = planned.files if planned is not None else files

    @property
    def count(self) -> int:
        """How many instances it has."""
        return sum(group.count for group in self.config.instances)

    @property
    def estimated_bytes(self) -> int:
        """What it takes in memory at least, before anybody knows more: nobody is refused for a guess."""
        return self._run_files.model_bytes * self.count

    def loads(self, cpus: int, number: Callable[[], int]) -> list[Load]:
        """What the worker of each instance is asked; each has another ``number``, and its part of the ``cpus``."""
        config, files, planned = self.config, self._run_files, self._planned
        wanted = config.parameters.get("intra_op_threads")
        threads = threads_for(
            cpus, self.count, wanted if isinstance(wanted, int) and not isinstance(wanted, bool) else None
        )
        declared = declared_signature(self._folder)
        return [
            Load(
                instance=number(),
                backend=files.backend,
                name=self._folder.name,
                version=str(self._files.version),
                path=str(files.model_path),
                device=group.device,
                threads=threads,
                signature=declared,
                max_batch_size=config.max_batch_size,
                parameters=dict(config.parameters),
                warmup=config.warmup,
                decoupled=config.decoupled,
                sequence=self._folder.sequence,
                reshapes=reshapes(self._folder),
                config_json=config_json(self._folder, self._files.version),
                repository=str(self._folder.path),
                replay=str(planned.replay) if planned is not None else "",
                tolerance=planned.plan.tolerance if planned is not None else 0.0,
            )
            for group in config.instances
            for _ in range(group.count)
        ]

    def needs(self, before: Loaded | None, *, pages: bool) -> list[Needs]:
        """What placement has to know of each instance, in the order of their loads.

        ``before`` is as one was loaded the first time, None before that; with ``pages`` they come and go with requests.
        """
        return [self._needs(group, before, pages) for group in self.config.instances for _ in range(group.count)]

    def _needs(self, group: InstanceConfig, before: Loaded | None, pages: bool) -> Needs:
        files, limit = self._run_files, group.rate_limit
        resources = {(group.device, name): count for name, count in limit.resources.items()}
        resources |= {(GLOBAL, name): count for name, count in limit.global_resources.items()}
        return Needs(
            files.model_bytes,
            # What is bounded by itself must be measured by itself.
            files.backend in SHAREABLE and not self._folder.config.memory_limit_bytes,
            device_for(group.device, files.backend),
            # The file's size before anybody knows more: nobody is refused for a larger guess.
            max(group.gpu_memory_bytes or files.model_bytes, before.gpu_bytes if before is not None else 0),
            pages=pages,
            again=before is not None,
            resources=resources,
            priority=limit.priority,
        )


def version_print(folder: ModelFolder, version: int) -> str:
    """What changes when the version has to be loaded anew: its own files, or the model's configuration."""
    return f"{folder.config_print}/{folder.versions[version].print}"
