"""The text of an ncnn model (``.param``): its layers, and what goes in and comes out. Weights lie elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

_MAGIC = "7767517"  # of the text form
_INPUT = "Input"
# Where the layer Input has its sizes, by how many dimensions there are, outermost first: channel, depth, height, width.
_SIZES = {1: ("0",), 2: ("1", "0"), 3: ("2", "1", "0"), 4: ("2", "11", "1", "0")}


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
        return cls(layers)

    @property
    def inputs(self) -> dict[str, tuple[int, ...] | None]:
        """The shape of one row of each input, by name; None where the file does not tell it."""
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
        """The same, with the shape of one row of each of these inputs: ncnn chooses kernels by it."""
        layers = []
        for layer in self.layers:
            if layer.kind == _INPUT and layer.writes[0] in shapes:
                shape = shapes[layer.writes[0]]
                sizes = zip(_SIZES[len(shape)], shape, strict=True)
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
    if reads < 0 or writes < 0 or len(names) != reads + writes or not all("=" in option for option in options):
        raise NotNcnn(f"'{' '.join(words)[:80]}' is no layer with {reads} inputs and {writes} outputs")
    return Layer(words[0], words[1], names[:reads], names[reads:], options)


def _shape(layer: Layer) -> tuple[int, ...] | None:
    options = dict(option.split("=", 1) for option in layer.options)
    for keys in reversed(_SIZES.values()):
        sizes = [options.get(key, "") for key in keys]
        if all(size.isdecimal() and int(size) for size in sizes):
            return tuple(map(int, sizes))
    return None


def _renamed(layer: Layer, names: Mapping[str, str]) -> Layer:
    reads, writes = (tuple(names.get(name, name) for name in some) for some in (layer.reads, layer.writes))
    return replace(layer, reads=reads, writes=writes)
