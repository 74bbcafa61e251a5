"""The base of all parameter classes: strict types; values from Python, YAML, papermill and the command line alike.

They are parsed by the parameter's type: "false" is False for a switch, "1e-4" a number, a comma in a prompt a comma.
What does not fit is an error that names the parameter, the value and what was expected.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Optional, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator
from pydantic.fields import FieldInfo
from typing_extensions import Self

SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
BOUNDS = {Ge: ("ge", "{} or more"), Gt: ("gt", "more than {}"), Le: ("le", "{} or less"), Lt: ("lt", "less than {}"),
          MultipleOf: ("multiple_of", "a multiple of {}"), MinLen: ("min_length", "{} or more letters")}  # fmt: skip

PathText = Annotated[
    str, Field(min_length=1), AfterValidator(os.path.expanduser)
]  # a path or hub id; ~ is the home folder
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1)]
Processes = Positive | None
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Device = Literal["auto", "cuda", "mps", "cpu"]


def parameter(default: object, description: str, heading: str | None = None) -> object:
    """A field with the one-line description that the notebook's parameters cell and `--help` show.

    Args:
        heading: above this parameter and those after it, in both.
    """
    return Field(default, description=description, json_schema_extra={"heading": heading} if heading else None)


def heading_of(field: FieldInfo) -> str | None:
    """The heading above a parameter, if it has one."""
    return (field.json_schema_extra or {}).get("heading")


class Config(BaseModel):
    """Parameters of a notebook or a command: frozen, typed, checked when they are made.

    Raises:
        ValueError: an unknown parameter, or a value that does not fit; every fault is named.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    notebook: ClassVar[str | None] = None

    def __init__(self, **values: object):
        unknown = [name for name in values if name not in type(self).model_fields]
        if unknown:
            raise ValueError("\n".join(type(self)._unknown(name) for name in unknown))
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError("\n".join(type(self)._fault(fault, values) for fault in error.errors())) from None

    @field_validator("*", mode="before")
    @classmethod
    def _parsed(cls, value: object, info) -> object:
        return parse(value, cls.model_fields[info.field_name])

    @classmethod
    def _unknown(cls, name: str) -> str:
        near = difflib.get_close_matches(name, cls.model_fields, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        return f"{cls.notebook or cls.__name__} has no parameter {name}{meant}: it has {', '.join(cls.model_fields)}"

    @classmethod
    def _fault(cls, fault: Mapping, values: Mapping) -> str:
        if not fault["loc"] or fault["type"] == "value_error":  # of a validator of ours
            return fault["msg"].removeprefix("Value error, ")
        name = str(fault["loc"][0])
        field, value = cls.model_fields[name], values.get(name)
        typed = fault["type"] in ("string_type", "literal_error") and is_text(field) and not isinstance(value, str)
        advice = ". Plain papermill's -p turns texts into numbers: use papermill -r, or bksdm run" if typed else ""
        return f"{name} is {value!r}: expected {expected(field)}{advice}"

    @classmethod
    def preset_decides(cls, *names: str) -> type[Self]:
        """This class with these parameters None by default, for the preset to fill in."""
        optional = {}
        for name in names:
            field = cls.model_fields[name]
            kind = Annotated[(field.annotation, *field.metadata, "")]  # which wants metadata, also without bounds
            optional[name] = Optional[kind], parameter(None, field.description, heading_of(field))  # noqa: UP045
        return create_model(cls.__name__, __base__=cls, __module__=cls.__module__, **optional)

    def but(self, **changes: object) -> Self:
        """A copy with named changes, checked like any other."""
        return type(self)(**{**self.values(), **changes})

    def values(self) -> dict[str, object]:
        """Every parameter by name."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def part(self, kind: type[Config], **changes: object) -> Config:
        """The parameters that this class shares with `kind`, as a `kind`; the others keep their defaults."""
        shared = {n: v for n, v in self.values().items() if n in kind.model_fields and v is not None}
        return kind(**{**shared, **changes})


def kind_of(field: FieldInfo) -> object:
    """The type that a field takes, None and annotations left out."""
    kinds = get_args(field.annotation) if takes_none(field) else (field.annotation,)
    return _bare(next(kind for kind in kinds if kind is not type(None)))


def _bare(kind: object) -> object:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def is_text(field: FieldInfo) -> bool:
    """Whether a field takes text or one of several words."""
    return kind_of(field) is str or get_origin(kind_of(field)) is Literal


def takes_none(field: FieldInfo) -> bool:
    """Whether None is a value of a field."""
    return type(None) in get_args(field.annotation)


def parse(value: object, field: FieldInfo) -> object:
    """A value of any way in as the field's type; what cannot be parsed comes back as it is, for pydantic to refuse."""
    kind, none = kind_of(field), takes_none(field) and not is_text(field)
    if value is None or (none and isinstance(value, str) and value.strip().lower() in ("none", "null")):
        return None
    if get_origin(kind) is not tuple:
        return _parse_one(value, kind)
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_parse_one(item, get_args(kind)[0]) for item in items)


def _parse_one(value: object, kind: object) -> object:
    kind = _bare(kind)
    if kind is bool:
        return SWITCHES.get(str(value).strip().lower(), value) if isinstance(value, (str, int)) else value
    if kind in (int, float):
        return _number(value, kind)
    no = get_origin(kind) is Literal and "no" in get_args(kind) and value is False  # YAML reads no as False
    return "no" if no else value


def _number(value: object, kind: type) -> object:
    if isinstance(value, bool):
        return str(value)  # never the number 1: refused as text is
    if isinstance(value, str):
        try:
            value = int(value) if re.fullmatch(r"\s*[+-]?\d+\s*", value) else float(value)
        except ValueError:
            return value
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return float(value) if kind is float and isinstance(value, int) and abs(value) < 2**1000 else value


def expected(field: FieldInfo) -> str:
    """What a field takes, in words: "a whole number of 1 or more, or None"."""
    kind = kind_of(field)
    several = get_origin(kind) is tuple
    text = f"a list (commas between its values) of {_word(get_args(kind)[0])}" if several else _word(kind)
    inner = [item for part in get_args(field.annotation) for item in getattr(part, "__metadata__", ())]
    bounds = [template.format(f"{getattr(m, attribute):,}") for item in (*field.metadata, *inner)
              for m in (item.metadata if isinstance(item, FieldInfo) else [item])
              for bound, (attribute, template) in BOUNDS.items() if isinstance(m, bound)]  # fmt: skip
    return text + (f" of {' and '.join(bounds)}" if bounds else "") + (", or None" if takes_none(field) else "")


def _word(kind: object) -> str:
    kind = _bare(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return {bool: "a switch (true, false, yes, no, on, off, 1 or 0)", int: "a whole number", float: "a number",
            str: "text"}[kind]  # fmt: skip
