"""Which memory node's CPUs a worker is kept to: on machines with several, memory of another node is slower."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Node:
    """A memory node, and those of its CPUs that this process may use."""

    number: int
    cpus: frozenset[int]


def assign(threads: int, nodes: Sequence[Node], assigned: Mapping[int, int]) -> Node | None:
    """The node for a worker of so many threads, or None where it may run anywhere.

    It is the one with the most CPUs left for each thread that it has or would have; ``assigned`` are the threads of
    other workers by node. A worker that needs more than any node has is not kept to one.
    """
    fitting = [node for node in nodes if len(node.cpus) >= threads]
    if len(nodes) < 2 or not fitting:
        return None
    return min(fitting, key=lambda node: ((assigned.get(node.number, 0) + threads) / len(node.cpus), node.number))


def read_nodes(folder: Path = Path("/sys/devices/system/node"), allowed: Collection[int] | None = None) -> list[Node]:
    """The nodes that have CPUs which this process may use (``allowed``; by default its affinity), by number."""
    usable = frozenset(os.sched_getaffinity(0) if allowed is None else allowed)
    nodes = []
    for path in folder.glob("node[0-9]*"):
        try:
            cpus = parse_cpus((path / "cpulist").read_text()) & usable
        except (OSError, ValueError):
            continue  # a kernel without that file: better no node than a wrong one
        if cpus:
            nodes.append(Node(int(path.name.removeprefix("node")), cpus))
    return sorted(nodes, key=lambda node: node.number)


def parse_cpus(text: str) -> frozenset[int]:
    """The numbers of a kernel's list, as ``0-3,8``."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)
