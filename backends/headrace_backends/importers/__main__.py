"""The process that converts one model: reads its task, writes the ONNX file and its answer, and ends."""

import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

import msgspec

from headrace.core.parent_death import die_with_parent
from headrace_backends.base import LoadError
from headrace_backends.importers.conversion import ANSWER_FILE, TASK_FILE, Answer, Task

_MOST_TOLD = 1500  # characters of a converter's message


def main(folder: Path) -> None:
    """Do what the folder's task says; every failure of the framework is an answer."""
    task = msgspec.json.decode((folder / TASK_FILE).read_bytes(), type=Task)
    die_with_parent()
    if os.getppid() != task.parent:  # it had ended before the kernel was told
        sys.exit(1)
    module, _, name = task.converter.partition(":")
    try:
        answer = Answer(getattr(import_module(module), name)(task))
    except LoadError as error:
        answer = Answer(error=str(error))
    except MemoryError:
        answer = Answer(error=f"there is not enough memory to convert '{Path(task.source).name}'")
    except Exception as error:  # noqa: BLE001 - frameworks and what files make them do may raise anything
        traceback.print_exc()
        told = " ".join(f"{type(error).__name__}: {error}".split())[:_MOST_TOLD]
        answer = Answer(error=f"'{Path(task.source).name}' cannot be converted to ONNX: {told}")
    (folder / ANSWER_FILE).write_bytes(msgspec.json.encode(answer))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the file is there; what frameworks do at their end may take long, or crash


if __name__ == "__main__":
    main(Path(sys.argv[1]))
