"""The text of an ncnn model (``.param``): its layers, and what goes in and comes out. Weights lie elsewhere."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

_MAGIC = "7767517"  # of the text form
_INPUT = "Input"
# Where the layer Input has its sizes, by how many dimensions there are, outermost first: channel, depth, height, width.
_MOST_LAYERS = 10_000  # ncnn goes through them by calling itself
_LIST = -23300  # less the number of an option that is a list
# What ncnn takes for an option: a number, a list of them behind its length, or a text.
_OPTION = re.compile(r'\d{1,2}=(?:[-+.\dEe]+|"[^"]*")|-233\d\d=\d+(?:,[-+.\dEe]+)*', re.ASCII)
_WHOLE = re.compile(r"[-+]?\d{1,10}", re.ASCII)
_ROWS = 29  # an option of the layer Input that ncnn does not have: how many rows there are, where their number is fixed
_SIZES = {1: (0,), 2: (1, 0), 3: (2, 1, 0), 4: (2, 11, 1, 0)}


class NotNcnn(ValueError):
    """The text is no such graph; the message says why."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One line: an operator, the names of the tensors that it reads and writes, and its options as they are written."""

    kind: str
    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    options: tuple[str, ...]

    def number(self, key: int, default: int = 0) -> int:
        """An option that is a whole number.

        Raises:
            NotNcnn: it is something else.
        """
        written = self._written(key)
        return default if written is None else self._whole(written)

    def numbers(self, key: int) -> list[int]:
        """An option that is a list of whole numbers, empty where it is not there.

        Raises:
            NotNcnn: it is something else.
        """
        return [self._whole(one) for one in self.listed(key)]

    def listed(self, key: int) -> list[str]:
        """A list of numbers as they are written, empty where it is not there.

        Raises:
            NotNcnn: it is something else.
        """
        return (self._written(key, listed=True) or "0").split(",")[1:]

    def flag(self, key: int, default: int = 0) -> bool:
        """An option that is 0 or 1: ncnn is not of one mind about what others mean.

        Raises:
            NotNcnn: it is something else.
        """
        found = self.number(key, default)
        if found not in (0, 1):
            raise NotNcnn(f"layer '{self.name}' ({self.kind}) has {key}={found}, expected 0 or 1")
        return bool(found)

    def real(self, key: int, default: float) -> float:
        """An option that may have a fraction.

        Raises:
            NotNcnn: it is no number.
        """
        written = self._written(key)
        try:
            return default if written is None else float(written)
        except ValueError:
            raise NotNcnn(f"layer '{self.name}' ({self.kind}) has the option {key}={written}, no number") from None

    def text(self, key: int) -> str:
        """An option that is a text, empty where it is not there.

        Raises:
            NotNcnn: it is something else.
        """
        written = self._written(key) or '""'
        if written[:1] != '"':
            raise NotNcnn(f"layer '{self.name}' ({self.kind}) has the option {key}={written}, no text")
        return written[1:-1]

    def _written(self, key: int, *, listed: bool = False) -> str | None:
        for option in self.options:
            written = option.split("=", 1)
            if _number_of(written[0]) == key:
                if (int(written[0]) <= _LIST) is not listed:
                    raise NotNcnn(f"layer '{self.name}' ({self.kind}) has '{option}', and expects it otherwise")
                return written[1]
        return None

    def _whole(self, written: str) -> int:
        if not _WHOLE.fullmatch(written) or not -(2**31) <= int(written) < 2**31:
            raise NotNcnn(f"layer '{self.name}' ({self.kind}) has '{written}' where a whole number is expected")
        return int(written)

    def __str__(self) -> str:
        counts = (str(len(self.reads)), str(len(self.writes)))
        return " ".join((self.kind, self.name, *counts, *self.reads, *self.writes, *self.options))


@dataclass(frozen=True, slots=True)
class NcnnGraph:
    """All layers, in order of execution."""

    layers: tuple[Layer, ...]

    @classmethod
    def parse(cls, text: str) -> "NcnnGraph":
        """Read what ncnn or its converters have written.

        Raises:
            NotNcnn: something else is in it, or it is not whole.
        """
        lines = [line.split() for line in text.splitlines() if line.strip()]
        if lines[:1] != [[_MAGIC]]:
            raise NotNcnn(f"it does not begin with {_MAGIC}, as ncnn's text form does")
        if len(lines) < 2 or len(lines[1]) != 2 or not lines[1][0].isdecimal():
            raise NotNcnn("its second line does not say how many layers there are")
        promised, layers = int(lines[1][0]), tuple(map(_layer, lines[2:]))
        if promised != len(layers):
            raise NotNcnn(f"it promises {promised} layers and has {len(layers)}")
        if promised > _MOST_LAYERS:
            raise NotNcnn(f"it has {promised} layers, and at most {_MOST_LAYERS} are taken")
        _check_connections(layers)
        return cls(layers)

    @property
    def inputs(self) -> dict[str, tuple[int, ...] | None]:
        """The shape of each input by name, that of one row behind -1 or 1; None where the file does not tell it."""
        return {name: _shape(layer) for layer in self.layers if layer.kind == _INPUT for name in layer.writes}

    @property
    def outputs(self) -> list[str]:
        """What no layer reads."""
        read = {name for layer in self.layers for name in layer.reads}
        return [name for layer in self.layers for name in layer.writes if name not in read]

    def with_names(self, names: Mapping[str, str]) -> "NcnnGraph":
        """The same with some tensors renamed; what else has one of the new names gets another.

        Raises:
            NotNcnn: a new name is not one word, or stands for two tensors.
        """
        wanted = list(names.values())
        unfit = [name for name in wanted if len(name.split()) != 1 or wanted.count(name) > 1]
        if unfit:
            raise NotNcnn(f"{unfit[0]!r} cannot be the name of a tensor: one word is needed, once")
        present = {name for layer in self.layers for name in layer.writes}
        full = dict(names)
        for name in sorted(present - names.keys()):
            new = name
            while new in wanted or (new != name and new in present):
                new = f"_{new}"
            full[name] = new
        return NcnnGraph(tuple(_renamed(layer, full) for layer in self.layers))

    def with_outputs(self, names: Sequence[str]) -> "NcnnGraph":
        """The same, with its outputs in this order: layers that do nothing, one for each, are the last."""
        if self.outputs == list(names):
            return self
        inner = self.with_names({name: f"{name}_inner" for name in names})
        last = (Layer("Noop", f"output_{place}", (f"{name}_inner",), (name,), ()) for place, name in enumerate(names))
        return NcnnGraph((*inner.layers, *last))

    def with_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> "NcnnGraph":
        """The same, with these shapes of inputs: that of one row, by which ncnn chooses kernels, behind -1 or 1."""
        layers = []
        for layer in self.layers:
            if layer.kind == _INPUT and layer.writes[0] in shapes:
                rows, *shape = shapes[layer.writes[0]]
                sizes = [*zip(_SIZES[len(shape)], shape, strict=True), *([(_ROWS, rows)] if rows == 1 else [])]
                layers.append(replace(layer, options=tuple(f"{key}={size}" for key, size in sizes)))
            else:
                layers.append(layer)
        return NcnnGraph(tuple(layers))

    def __str__(self) -> str:
        tensors = sum(len(layer.writes) for layer in self.layers)
        return "\n".join((_MAGIC, f"{len(self.layers)} {tensors}", *map(str, self.layers), ""))


def _layer(words: list[str]) -> Layer:
    try:
        reads, writes = int(words[2]), int(words[3])
        names, options = tuple(words[4 : 4 + reads + writes]), tuple(words[4 + reads + writes :])
    except (IndexError, ValueError):
        raise NotNcnn(f"'{' '.join(words)[:80]}' is no layer") from None
    if reads < 0 or writes < 0 or len(names) != reads + writes:
        raise NotNcnn(f"'{' '.join(words)[:80]}' is no layer with {reads} inputs and {writes} outputs")
    keys: set[int] = set()
    for option in options:
        fits = _OPTION.fullmatch(option) is not None
        name, value = option.split("=", 1) if fits else ("0", "")
        key, (length, *found) = _number_of(name), value.split(",")
        if not fits or key in keys or (int(name) <= _LIST and int(length) != len(found)):
            raise NotNcnn(f"layer '{words[1]}' ({words[0]}) has '{option[:80]}' where an option is expected, each once")
        keys.add(key)
    return Layer(words[0], words[1], names[:reads], names[reads:], options)


def _number_of(key: str) -> int:
    """An option's number, which may be written as that of a list."""
    return _LIST - int(key) if int(key) <= _LIST else int(key)


def _check_connections(layers: Sequence[Layer]) -> None:
    """Each tensor is written by one layer, and read by one behind it: so there are no circles."""
    unread: dict[str, bool] = {}  # by name
    for layer in layers:
        for name in layer.reads:
            if not unread.get(name):
                what = (
                    "is read by two layers, without a Split between" if name in unread else "is written by none before"
                )
                raise NotNcnn(f"layer '{layer.name}' ({layer.kind}) reads '{name}', which {what}")
            unread[name] = False
        for name in layer.writes:
            if name in unread:
                raise NotNcnn(f"layer '{layer.name}' ({layer.kind}) writes '{name}', which another one writes too")
            unread[name] = True


def _shape(layer: Layer) -> tuple[int, ...] | None:
    told = {key: layer.number(key) for key in (0, 1, 2, 11)}
    if not any(told.values()):
        return None
    for keys in _SIZES.values():
        if {key for key, size in told.items() if size} == set(keys) and min(told.values()) >= 0:
            return (1 if layer.number(_ROWS) == 1 else -1, *(told[key] for key in keys))
    raise NotNcnn(f"layer '{layer.name}' ({layer.kind}) has sizes that are none: {' '.join(layer.options)}")


def _renamed(layer: Layer, names: Mapping[str, str]) -> Layer:
    reads, writes = (tuple(names.get(name, name) for name in some) for some in (layer.reads, layer.writes))
    return replace(layer, reads=reads, writes=writes)
