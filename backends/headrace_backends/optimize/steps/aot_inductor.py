"""An exported program as a compiled package (AOTInductor): machine code for the device that the model is served on.

It is compiled for as many threads as it is given later, since one package serves every layout, and takes a batch of one
row as it is: whether its answers to that are right is found out as with every other form.
"""

import json
import os
import shutil
from pathlib import Path
from time import monotonic

import msgspec
import torch

from headrace_backends.base import LoadError, ModelSource
from headrace_backends.compiled_package import INPUTS
from headrace_backends.optimize import cuda_headers
from headrace_backends.optimize.cuda_headers import NoCudaHeaders
from headrace_backends.optimize.quiet import hushed
from headrace_backends.optimize.steps import options
from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.torch import torch_device
from headrace_backends.torch_exported import argument_names, load_exported
from headrace_backends.torch_model import gist
from headrace_backends.torch_running import CACHE_VARIABLE, lacks_compiler

_HOW = {
    "compile_threads": 1,  # no pool of processes, which would outlive the step
    "cpp.dynamic_threads": True,
    "aot_inductor.check_lowerbound": False,
    "aot_inductor.precompile_headers": False,  # which pays from the second program on
    "aot_inductor.enable_line_tables": False,  # for profilers alone, and unknown to torch before 2.13
}


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """There are none."""


def apply(task: StepTask) -> Path:
    """Compile the program, with the names of its inputs beside the code."""
    options.read("aot_inductor", Options, task.options)
    if task.source.suffix != ".pt2":
        raise StepFailed(f"'{task.source.name}' is no exported program (.pt2), which this step is for")
    torch.set_num_threads(max(1, task.threads))  # else the compiler sees no use in threads
    path, compilers = task.folder / "model.pt2", task.folder / "compiler"
    os.environ[CACHE_VARIABLE] = str(compilers)  # machine code on its way: nobody else may write there
    began = monotonic()
    try:
        source = ModelSource("model", "1", task.source, task.device)
        device = torch_device(source)
        if device.type == "cuda":
            cuda_headers.find_for(str(torch.version.cuda))
        program = load_exported(source, device)
        known = torch._inductor.config.get_config_copy()  # noqa: SLF001 - as below
        how = {name: value for name, value in _HOW.items() if name in known}
        names = {INPUTS: json.dumps(argument_names(program))}
        with hushed():
            torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - torch has no other name for it
                program, package_path=str(path), inductor_configs={**how, "aot_inductor.metadata": names}
            )
    except (LoadError, NoCudaHeaders) as error:
        raise StepFailed(str(error)) from error
    except Exception as error:  # the compiler promises no types
        raise StepFailed(_why(str(error) or type(error).__name__)) from error
    finally:
        shutil.rmtree(compilers, ignore_errors=True)
    task.note(
        f"compiled in {monotonic() - began:.0f} s to machine code for this machine; served outside of a plan, it needs "
        "parameters.allow_native_code"
    )
    return path


def _why(text: str) -> str:
    if lacks_compiler(text):
        return f"it takes a C++ compiler, and there is none: install g++, or set CXX and CC ({gist(text)})"
    return f"the program cannot be compiled: {gist(text)[:300]}"
