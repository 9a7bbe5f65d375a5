"""The numbers of a report as TensorBoard scalars. Needs tensorboard, and not TensorFlow."""

import sys
import tempfile
from math import isfinite
from pathlib import Path
from types import ModuleType

from headrace_backends.optimize import reading
from headrace_backends.optimize.findings import Findings


def write_scalars(findings: Findings, path: Path) -> None:
    """Write one event file. TensorBoard finds it by ``tfevents`` in its name.

    ``candidate/...`` has a step for each candidate, by its number in the report; ``latency``, ``tail`` and
    ``throughput`` have a series for each candidate and a step for each batch size.
    """
    # TensorBoard takes TensorFlow where that is installed, which costs seconds and prints pages, but if it finds this.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    from tensorboard.summary import Writer

    with tempfile.TemporaryDirectory(prefix=".tensorboard-", dir=path.parent) as folder:
        writer = Writer(folder)
        for tag, value, step in _scalars(findings):
            if value is not None and isfinite(value):
                writer.add_scalar(tag, value, step)
        writer.close()
        (written,) = Path(folder).iterdir()
        written.replace(path)


def _scalars(findings: Findings) -> list[tuple[str, float | None, int]]:
    told: list[tuple[str, float | None, int]] = []
    metric = reading.metric_label(findings.budget)
    for one in reading.candidates(findings):
        row, number = one.row, one.number
        told += [
            ("candidate/speedup", row.speedup, number),
            (f"candidate/{metric}", reading.decided_by(row, findings.budget), number),
            ("candidate/file_bytes", row.file_bytes, number),
            ("candidate/memory_bytes", row.memory_bytes, number),
            ("candidate/build_s", row.build_s, number),
        ]
        series = "reference" if one.is_reference else f"{number} {row.form.backend}"
        for point in row.curve:
            told += [(f"latency/{series} p50_ms", point.p50_ms, point.rows)]
            told += [(f"tail/{series} p99_ms", point.p99_ms, point.rows)]
            if point.p50_ms:
                told += [(f"throughput/{series} rows_per_s", point.rows_per_s, point.rows)]
    for place, layer in enumerate(findings.sensitivities):
        told.append(("sensitivity/by_layer", layer.error, place))
    return told
