"""What a TorchScript module's code does to its own attributes: which it sets, and which no answer depends on."""

from typing import Any

_CONTAINERS = ("ListType", "DictType")
_COUNTING = ("aten::add", "aten::add_", "aten::sub", "aten::sub_")


def changing(module: Any) -> set[str]:
    """The attributes that the code sets, and the lists and dicts that it could put something into.

    Each method is looked at where it stands: to put all of them into one graph takes a second for a large model.
    """
    found: set[str] = set()
    for place, part in module.named_modules():
        code = part._c  # noqa: SLF001 - no other way to the methods
        for method in map(code._get_method, code._method_names()):  # noqa: SLF001
            names = [_name(node) for node in _setting(method.graph)]
            found |= {f"{place}.{name}" if place else name for name in names if name is not None}
    return found


def _setting(graph: Any) -> list[Any]:
    got = graph.findAllNodes("prim::GetAttr", True)
    put_into = [node for node in got if node.output().type().kind() in _CONTAINERS]
    return [*graph.findAllNodes("prim::SetAttr", True), *put_into]


def unread(module: Any) -> set[str]:
    """The attributes of which the code makes nothing but their own next value, as it does with a counter."""
    read: set[str | None] = set()
    seen: set[str | None] = set()
    graph = module.inlined_graph  # its nodes are gone when it is
    for node in graph.findAllNodes("prim::GetAttr", True):
        name = _name(node)
        seen.add(name)
        if not _counts(node.output(), name):
            read.add(name)
    return {name for name in seen - read if name is not None}


def _counts(value: Any, name: str | None) -> bool:
    """Whether the value goes into nothing but sums, and those into the attribute of this name."""
    for use in value.uses():
        user = use.user
        if user.kind() == "prim::SetAttr" and _name(user) == name:
            continue
        if user.kind() not in _COUNTING or not all(_counts(output, name) for output in user.outputs()):
            return False
    return True


def _name(node: Any) -> str | None:
    """The whole name of the attribute that the node gets or sets; None where it is not a module's."""
    name: str = node.s("name")
    owner = node.inputsAt(0).node()
    if owner.kind() == "prim::Param":
        return name
    above = _name(owner) if owner.kind() == "prim::GetAttr" else None
    return None if above is None else f"{above}.{name}"
