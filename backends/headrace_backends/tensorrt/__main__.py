"""``python -m headrace_backends.tensorrt model.onnx model.plan``: an engine built ahead of time, as a file."""

import argparse
import sys
from pathlib import Path
from typing import Any

from headrace_backends.base import BackendUnavailable, LoadError, ModelSource
from headrace_backends.parameters import refuse_unknown
from headrace_backends.tensorrt.backend import BUILD_PARAMETERS, build_engine, derive_profiles
from headrace_backends.tensorrt.builder import parse_onnx, read_options, told
from headrace_backends.tensorrt.engine_file import HEADER_BYTES, read_header
from headrace_backends.tensorrt.library import find_library


def main(arguments: list[str] | None = None) -> int:
    """Build one engine; returns 1 where that is refused, with the reason on standard error."""
    parser = argparse.ArgumentParser(prog="python -m headrace_backends.tensorrt", description=__doc__)
    parser.add_argument("onnx", type=Path, help="the ONNX file")
    parser.add_argument("engine", type=Path, help="the engine file to write")
    parser.add_argument("--max-batch-size", type=int, default=None, help="rows in one execution, 32 unless given")
    parser.add_argument(
        "-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="as in the model's configuration"
    )
    asked = parser.parse_args(arguments)
    try:
        for line in _build(asked.onnx, asked.engine, asked.max_batch_size, _parameters(asked.parameter)):
            print(line)  # noqa: T201 - this is the command's output
    except (LoadError, BackendUnavailable, OSError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - as above
        return 1
    return 0


def _parameters(texts: list[str]) -> dict[str, Any]:
    pairs = [text.partition("=") for text in texts]
    wrong = [name for name, equals, _ in pairs if not equals]
    if wrong:
        raise LoadError(f"a parameter is {wrong[0]!r}, expected NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _build(onnx: Path, engine: Path, max_batch_size: int | None, parameters: dict[str, Any]) -> list[str]:
    refuse_unknown("tensorrt", parameters, ("library", *BUILD_PARAMETERS))
    library = find_library(parameters.get("library"))
    options = read_options(parameters, library)
    parsed = parse_onnx(library, onnx, "fp32")
    notes: list[str] = []
    source = ModelSource(onnx.stem, "1", onnx, max_batch_size=max_batch_size, parameters=parameters)
    profiles = derive_profiles(source, parsed, notes)
    data, _ = build_engine(library, onnx, parsed, options, profiles)
    new = engine.with_name(f".{engine.name}.new")
    new.write_bytes(data)
    new.replace(engine)
    header = read_header(data[:HEADER_BYTES])
    targets = "".join(f" {major}.{minor}" for major, minor in header.targets) if header else ""
    shapes = [f"shapes: {told(profile)}" for profile in profiles]
    built = f"{engine}: {len(data)} bytes, {options.precision}, built by {library}"
    return [*notes, *shapes, built + (f" for compute capability{targets}" if targets else "")]


if __name__ == "__main__":
    sys.exit(main())
