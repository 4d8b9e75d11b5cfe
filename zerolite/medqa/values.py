"""A value of an option, from a command line or a YAML file, as the option's type."""

import dataclasses
import operator

from zerolite.medqa import names


def checked(name: str, field: dataclasses.Field, value):
    """A value from outside as the field's type; None only where the default is None."""
    if value is None and field.default is None:
        return None
    if field.metadata["many"]:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ValueError(f"{name}: expected at least one value, got none")
        found = tuple(_checked_one(name, field, one) for one in values)
        return names.targets(found) if field.name == "lora_target" else found
    return _checked_one(name, field, value)


def _checked_one(name: str, field: dataclasses.Field, value):
    limits = field.metadata
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[limits["kind"]]
    try:
        value = names.our_value(field.name, value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    try:
        found = _convert(limits["kind"], value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected {expected}, got {value!r}") from None
    if limits["choices"] and found not in limits["choices"]:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, limits['choices']))}, got {value!r}")
    for key, sign, holds in (("least", ">=", operator.ge), ("above", ">", operator.gt), ("most", "<=", operator.le)):
        if limits[key] is not None and not holds(found, limits[key]):  # also where it is not a number
            raise ValueError(f"{name}: expected {expected} {sign} {limits[key]}, got {value!r}")
    if found in (float("inf"), float("-inf")):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return found


def _convert(kind: type, value):
    """Strict, but for one thing: YAML reads 3e-4 as a text, which is a number here."""
    if kind is bool or isinstance(value, bool):
        if not (kind is bool and isinstance(value, bool)):
            raise TypeError
        return value
    if kind is str:
        if not isinstance(value, str) or not value:
            raise TypeError
        return value
    if not isinstance(value, (int, float, str)) or (kind is int and isinstance(value, float)):
        raise TypeError
    return kind(value)
