"""What an exported program's buffers have to do with its answers."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch

# Of their first tensor these take nothing but its shape and type.
_OF_ITS_SHAPE = ("aten.fill.", "aten.zero.", "aten.copy.", "aten.new_", "aten.sym_", "aten._assert_tensor_metadata.")
_LIKE = "_like."  # as in zeros_like


@dataclass(frozen=True, slots=True)
class BufferFlow:
    """What is certain of what a module writes to: no answer depends on it, or nothing of what is asked gets into it.

    ``unfed`` is None where the latter cannot be told. The statistics of a batch norm count as read: what it keeps them
    for is to normalise other requests.
    """

    unread: frozenset[str] = frozenset()
    unfed: frozenset[str] | None = frozenset()


def buffer_flow(program: Any) -> BufferFlow:
    """Of an exported program, by the way of each value through its graph.

    What is written in place is a value like any other in the form that torch makes of the program for that.
    """
    with warnings.catch_warnings():  # torch's own code uses what it calls deprecated
        warnings.simplefilter("ignore")
        functional = program.run_decompositions({})
    signature, graph = functional.graph_signature, functional.graph
    nodes = {node.name: node for node in graph.nodes}
    new = {name: nodes[key] for key, name in {**signature.buffers_to_mutate, **signature.parameters_to_mutate}.items()}
    held = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}
    old = {name: nodes[key] for key, name in held.items() if name in new}
    reaches = {name: _reached(node) for name, node in old.items()}
    asked = _reached(*(nodes[key] for key in signature.user_inputs if key in nodes))
    ends = {nodes[key] for key in signature.user_outputs if key in nodes}
    ends |= {node for node in graph.nodes if not node.users and node.op == "call_function" and not _of_shape(node)}
    read = {name for name, node in new.items() if _of_batch_norm(node)}
    more = True
    while more:  # whatever another one takes that is read
        wanted = ends | {new[name] for name in read}
        found = {name for name, reached in reaches.items() if reached & wanted} - read
        read |= found
        more = bool(found)
    unfed = {name for name, node in new.items() if node not in asked}
    return BufferFlow(frozenset(new.keys() - read), frozenset(unfed))


def _reached(*starts: Any) -> set[Any]:
    """The nodes whose values these have a part in, themselves among them."""
    reached: set[Any] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node in reached:
            continue
        reached.add(node)
        waiting += [user for user in node.users if user.op != "output" and node in _values(user)]
    return reached


def _values(node: Any) -> list[Any]:
    """The nodes whose values, and not their shapes alone, the node takes."""
    if not _of_shape(node):
        return list(node.all_input_nodes)
    return [value for value in (*node.args[1:], *node.kwargs.values()) if isinstance(value, torch.fx.Node)]


def _of_shape(node: Any) -> bool:
    name = str(node.target)
    return name.startswith(_OF_ITS_SHAPE) or (name.startswith("aten.") and _LIKE in name)


def _of_batch_norm(node: Any) -> bool:
    return any("batch_norm" in str(source.target) for source in (node, *node.all_input_nodes))
