"""YAML into plain values, with an eye on keys that are given twice."""

import reprlib
from collections.abc import Iterator

import yaml

from headrace.repository.config_problems import ConfigError, KeyPath, format_path


def read_yaml(text: str) -> tuple[object, list[str]]:
    """The plain values of a YAML document, and a problem for each key that it has twice.

    Raises:
        ConfigError: it is not YAML.
    """
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, []
        duplicates = list(_duplicates(node, (), set()))
        raw = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError([f"{where}{said}"]) from error
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        raise ConfigError([f"is not YAML: {error}"]) from error
    except RecursionError:
        raise ConfigError(["is nested too deeply"]) from None
    finally:
        if loader is not None:
            loader.dispose()
    return {} if raw is None else raw, duplicates


def _duplicates(node: yaml.Node, path: KeyPath, seen: set[int]) -> Iterator[str]:
    if id(node) in seen:  # an alias: looked at already, and perhaps part of itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicates(item, (*path, index), seen)
    elif isinstance(node, yaml.MappingNode):
        marks: dict[str, yaml.Mark] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else reprlib.repr(key.value)
            first = marks.setdefault(name, key.start_mark)
            if first is not key.start_mark:
                lines = f"line {first.line + 1} and line {key.start_mark.line + 1}"
                yield f"{format_path((*path, name))}: is given twice, in {lines}"
            yield from _duplicates(value, (*path, name), seen)
