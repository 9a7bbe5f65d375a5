"""The queue of a version, as its model's configuration has it, and what its batches may be. Pure."""

from headrace.batching.admission import Admission
from headrace.batching.policy import BatchLimits
from headrace.batching.queue import BatchQueue
from headrace.batching.sequence_queue import SequenceQueue
from headrace.batching.service_times import ServiceTimes
from headrace.core.model import Signature
from headrace.repository.layout import ModelFolder
from headrace.repository.model_config import BatchingConfig


def queue_for(folder: ModelFolder, instances: int) -> BatchQueue | SequenceQueue:
    """A queue for so many instances; what a batch holds it has to be told once the model file has said it."""
    batching, spec = folder.config.batching, folder.sequence
    order = batching.preserve_order
    if spec is not None:
        return SequenceQueue(folder.name, spec, batching.max_queue_size, preserve_order=order)
    return BatchQueue(
        folder.name,
        BatchLimits(),
        batching.max_queue_size,
        preserve_order=order,
        level_sizes={level: policy.max_size for level, policy in batching.level_policies().items()}
        if batching.priority_levels
        else None,
        admission=Admission(ServiceTimes(), 1 if order else instances) if batching.refuse_late else None,
        objective_ns=int((batching.p99_objective_ms or 0) * 1e6),
        adaptive=batching.adaptive,
    )


def limits_for(batching: BatchingConfig, signature: Signature) -> BatchLimits:
    """What a batch of the model may be.

    A decoupled model is given one request at a time: whoever is answered part by part has nobody to wait for.
    """
    most = signature.max_batch_size
    return BatchLimits(
        max_rows=1 if signature.decoupled else max(1, most),
        preferred_rows=tuple(size for size in batching.preferred_sizes if size <= most),
        max_delay_ns=batching.max_queue_delay_us * 1000 if most else 0,
    )
