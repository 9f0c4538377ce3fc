"""The values of frozen settings: what they may be, and how `field=value` is read. Knows no recipe.

Raises `UsageError` in one line that shows the field, what it may be, and the value.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from etenet.errors import UsageError


def check_at_least(least: float, owner: object, *names: str) -> None:
    """These fields are finite and not below `least`."""
    for name in names:
        value = getattr(owner, name)
        if not least <= value < math.inf:
            raise UsageError(f"{name} must be at least {least}, got {value}")


def check_at_most(most: float, owner: object, *names: str) -> None:
    """These fields are not above `most`."""
    for name in names:
        if getattr(owner, name) > most:
            raise UsageError(f"{name} must be at most {most}, got {getattr(owner, name)}")


def check_share(owner: object, *names: str, below_1: bool = False) -> None:
    """These fields are between 0 and 1; with `below_1` not 1 itself."""
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1 or (below_1 and value == 1):
            raise UsageError(f"{name} must be from 0 to 1{', 1 excluded' if below_1 else ''}, got {value}")


def check_one_of(choices: Sequence[str], owner: object, name: str) -> None:
    """This field is one of the choices."""
    if (value := getattr(owner, name)) not in choices:
        raise UsageError(f"{name} is one of {', '.join(choices)}, got {value!r}")


def settable(owner: object) -> list[str]:
    """The fields that `field=value` can change: those that hold one value."""
    return [
        field.name
        for field in fields(owner)  # type: ignore[arg-type]
        if isinstance(getattr(owner, field.name), bool | int | float | str)
    ]


def parsed(setting: str, owners: Sequence[object]) -> tuple[object, str, Any]:
    """`field=value` -> the first owner with that field, the field, and the value in the field's type."""
    name, _, text = setting.partition("=")
    owner = next((owner for owner in owners if name in settable(owner)), None)
    if owner is None:
        choice = ", ".join(field for owner in owners for field in settable(owner))
        raise UsageError(f"--set {setting}: no field {name!r}; choose one of {choice}")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    wanted = type(getattr(owner, name))
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise UsageError(f"--set {setting}: {name} is a {wanted.__name__}, such as {getattr(owner, name)!r}")
    return owner, name, value
