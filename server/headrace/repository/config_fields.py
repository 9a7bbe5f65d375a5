"""The values that a model's configuration is made of: their types and bounds, and the section that holds them."""

import reprlib
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from headrace.core.device import EXPECTED, is_device
from headrace.core.request import Parameter

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1


def _file_name(value: str) -> str:
    if value in ("", ".", "..") or "/" in value or "\\" in value or "\0" in value:
        raise ValueError(f"should be a file name without a path, got {value!r}")
    return value


def _device(value: str) -> str:
    if not is_device(value):
        raise ValueError(f"should be {EXPECTED}, got {value!r}")
    return value


def _scalar(value: object) -> object:
    if not isinstance(value, bool | int | float | str):
        raise ValueError(f"should be a string, a number or a boolean, got {reprlib.repr(value)}")  # noqa: TRY004 - pydantic collects ValueError only
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"should be an integer of at most 64 bits, got {reprlib.repr(value)}")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"should be text, got half a surrogate pair in {reprlib.repr(value)}")
    return value


Text = Annotated[str, Field(strict=True, min_length=1)]
FileName = Annotated[str, Field(strict=True), AfterValidator(_file_name)]
Device = Annotated[str, Field(strict=True), AfterValidator(_device)]
Scalar = Annotated[Parameter, PlainValidator(_scalar)]
Whole = Annotated[int, Field(strict=True, ge=0, le=_INT32_MAX)]
Dimension = Annotated[int, Field(strict=True, ge=-1, le=_INT64_MAX)]
Count = Annotated[int, Field(strict=True, ge=1, le=_INT32_MAX)]
SizeBytes = Annotated[int, Field(strict=True, ge=0, le=_INT64_MAX)]
DurationUs = Annotated[int, Field(strict=True, ge=0, le=_INT64_MAX // 1000)]  # holds as nanoseconds too
Version = Annotated[int, Field(strict=True, ge=1, le=_INT64_MAX)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Section(BaseModel):
    """A group of keys: nothing unknown is accepted, nothing changes later."""

    model_config = ConfigDict(frozen=True, extra="forbid")
