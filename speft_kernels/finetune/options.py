"""One setting of a run: its default, its rules, and its value as what it is to be."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import field
from typing import Any

from ..errors import ConfigError, nearest, shown


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with what the command line shows and `RunConfig` checks."""
    return field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "minimum": minimum,
            "above": above,
            "below": below,
        },
    )


def check_range(spec: dataclasses.Field[Any], value: Any) -> None:
    """Raise ConfigError where `value` breaks the rules of its `option`; None breaks none."""
    if value is None:
        return
    rules = spec.metadata
    if rules["choices"] and value not in rules["choices"]:
        raise ConfigError(
            f"{spec.name} = {shown(value)} is not one of {', '.join(rules['choices'])}."
            f"{nearest(value, rules['choices'])}"
        )
    if rules["minimum"] is not None and not value >= rules["minimum"]:
        raise ConfigError(f"{spec.name} = {value} must be at least {rules['minimum']}")
    if rules["above"] is not None and not value > rules["above"]:
        raise ConfigError(f"{spec.name} = {value} must be greater than {rules['above']}")
    if rules["below"] is not None and not value < rules["below"]:
        raise ConfigError(f"{spec.name} = {value} must be less than {rules['below']}")


def as_declared(name: str, declared: Any, value: Any) -> Any:
    """`value` of the setting `name` as one of the types that are `declared`, such as `int | None`.

    Raises ConfigError for what is none of them, or would lose information as one.
    """
    union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    kinds = [
        k for k in (typing.get_args(declared) if union else (declared,)) if k is not type(None)
    ]
    for kind in kinds:
        try:
            return as_kind(kind, value)
        except (TypeError, ValueError):
            continue
        except OverflowError:
            raise ConfigError(f"{name} is too large a number") from None
    wanted = " or ".join(map(_type_name, kinds))
    raise ConfigError(f"{name} = {shown(value)} is not {wanted}")


def as_kind(kind: Any, value: Any) -> Any:
    """`value` as this type; raises TypeError, ValueError or OverflowError."""
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if kind == tuple[int, int]:
        sides = value.lower().split("x") if isinstance(value, str) else value
        height, width = (as_kind(int, side) for side in sides)
        return (height, width)
    if kind == tuple[str, ...]:
        if isinstance(value, str) or not all(isinstance(item, str) for item in value):
            raise TypeError
        return tuple(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    if isinstance(value, str) and "_" in value:  # Python takes 1_0 for ten
        raise ValueError
    number = kind(value)
    if kind is int and abs(number) >= 2**63:
        raise OverflowError
    return number


def _type_name(kind: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", tuple[int, int]: "like 16x16"}
    return names.get(kind, "a list of names")
