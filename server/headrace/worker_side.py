"""The worker side of a server, as its settings have it; the commands that only look at models use it too."""

from headrace.config import Settings
from headrace.starting import CannotStart
from headrace.workers.cpus import usable_cpus
from headrace.workers.gpu_budget import GpuLimits
from headrace.workers.gpu_room import GpuRoom
from headrace.workers.numa import read_nodes
from headrace.workers.placement import PlacementLimits
from headrace.workers.rate_limit import RateLimiter, parse_counts
from headrace.workers.resources import Resources
from headrace.workers.supervisor import Supervisor


def build_supervisor(settings: Settings) -> Supervisor:
    """A supervisor that has no process yet.

    Raises:
        CannotStart: the resources for the rate limiter cannot be read.
    """
    try:
        counts = parse_counts(settings.rate_limit_resource)
    except ValueError as error:
        raise CannotStart(str(error)) from None
    limits = GpuLimits(settings.gpu_memory_bytes, settings.gpu_memory_fraction)
    return Supervisor(
        cpus=usable_cpus,
        limiter=RateLimiter(Resources(counts)) if settings.rate_limit != "off" else None,
        limits=PlacementLimits(own=settings.max_own_workers, shared=settings.max_shared_workers),
        load_timeout_s=settings.load_timeout,
        log_format=settings.log_format,
        nodes=read_nodes(),
        keeps_shared=settings.resident_bytes > 0,
        gpus=GpuRoom(limits) if limits else None,
    )
