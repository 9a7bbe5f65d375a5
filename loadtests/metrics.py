"""Counters out of a Prometheus page, and the mean batch size that two pages tell."""

import re

_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')


def counter(page: str, name: str, model: str) -> float | None:
    """The sum of a counter over the versions of a model; None where the page does not have it."""
    line = re.compile(rf'^{re.escape(name)}\{{((?:[^"}}]|"(?:[^"\\]|\\.)*")*)\}}\s+(\S+)', re.MULTILINE)
    values = [float(match[2]) for match in line.finditer(page) if dict(_LABEL.findall(match[1])).get("model") == model]
    return sum(values) if values else None


def labels(page: str, name: str, model: str) -> dict[str, str]:
    """The labels of a model's first series of that name; none where the page has none."""
    line = re.compile(rf'^{re.escape(name)}\{{((?:[^"}}]|"(?:[^"\\]|\\.)*")*)\}}', re.MULTILINE)
    told = [dict(_LABEL.findall(match[1])) for match in line.finditer(page)]
    return next((one for one in told if one.get("model") == model), {})


def mean_batch_rows(before: str, after: str, model: str) -> float | None:
    """Rows an execution, between two pages; None where the server does not tell or nothing was executed."""
    rows = _increase(before, after, "nv_inference_count", model)
    executions = _increase(before, after, "nv_inference_exec_count", model)
    return rows / executions if rows is not None and executions else None


def _increase(before: str, after: str, name: str, model: str) -> float | None:
    last = counter(after, name, model)
    return None if last is None else last - (counter(before, name, model) or 0.0)


def total(page: str, name: str) -> float:
    """The sum of a counter over all its series; 0 where the page does not have it."""
    line = re.compile(rf'^{re.escape(name)}(?:\{{(?:[^"}}]|"(?:[^"\\]|\\.)*")*\}})?\s+(\S+)', re.MULTILINE)
    return sum(float(match[1]) for match in line.finditer(page))
