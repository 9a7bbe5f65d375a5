"""What a server says when it is ready: a line for each model, and its addresses."""

from pathlib import Path

from headrace.repository.repository import Repository
from headrace.repository.served import ServedVersion


async def model_lines(repository: Repository) -> list[str]:
    """A line for each version: what it is served as, or why it is not."""
    entries = await repository.index()
    served = {(one.folder.name, one.version): one for one in repository.served()}
    lines = []
    for entry in entries:
        one = served.get((entry.name, entry.version))
        if one is None:
            if entry.state:
                lines.append(f"{entry.name} {entry.version or '-'}: {entry.state}: {entry.reason}")
            continue
        signature = one.info.signature
        inputs = ", ".join(spec.describe() for spec in signature.inputs)
        outputs = ", ".join(spec.describe() for spec in signature.outputs)
        batching = f"batches of up to {signature.max_batch_size}" if signature.max_batch_size else "no batching"
        planned = one.planned if isinstance(one, ServedVersion) else None
        backend = one.info.backend if planned is None else f"{one.info.backend} (as planned: {planned.name})"
        lines.append(f"{entry.name} {entry.version}: {entry.state}: {backend}, {inputs} -> {outputs}, {batching}")
    return lines


def no_model_line(repository: Path) -> str:
    """What to do where there is no model at all."""
    return f"there is no model in {repository} yet: a folder NAME/1/model.onnx there is one"


def ready_line(host: str, http: int, grpc: int, metrics: int) -> str:
    """Where the server can be reached, with the ports that were really bound."""
    shown = f"[{host}]" if ":" in host else host
    return f"ready: http://{shown}:{http} grpc://{shown}:{grpc} metrics http://{shown}:{metrics}/metrics"
