"""JSON to typed values, checked down to the last leaf: what a record holds is what its types say, or it is refused
where it is read. Nobody behind this border looks again."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

_T = TypeVar("_T")
_WHOLE = range(-(2**63), 2**64)  # what 64 bits hold, signed or not: larger ones cannot even be printed as floats


@dataclass(frozen=True)
class Within:
    """Bounds of a number, both allowed; NaN lies within none."""

    least: float = -math.inf
    most: float = math.inf


Count = Annotated[int, Within(0)]
Size = Annotated[int, Within(1)]
Finite = Annotated[float, Within(-1e300, 1e300)]
Positive = Annotated[float, Within(1e-300, 1e300)]


def built(kind: type[_T], data: Any) -> _T:
    """A value of type ``kind`` from JSON, with all that it holds: dataclasses of objects, tuples of lists. Values that
    are dataclasses already stay. Keys that a `TypedDict` does not name are kept as they are.

    Raises:
        TypeError: a field that is missing or not known, or a value that is not of its type; says where.
    """
    made: _T = _made(kind, data, "")
    return made


def _made(hint: Any, value: Any, at: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is NotRequired:
        return _made(args[0], value, at)
    if origin is Annotated:
        made = _made(args[0], value, at)
        return made if args[1].least <= made <= args[1].most else _refuse(value, at)
    if origin in (Union, UnionType):
        return _one_of(args, value, at)
    if origin is Literal:
        return value if value in args and not isinstance(value, bool) else _refuse(value, at)
    if origin in (list, tuple):
        return _several(origin, args, value, at)
    if origin is dict:
        return {key: _made(args[1], entry, f"{at}.{key}") for key, entry in _object(value, at).items()}
    if is_typeddict(hint):
        return _keyed(hint, _object(value, at), at)
    if is_dataclass(hint) and isinstance(hint, type) and not isinstance(value, hint):
        return _fielded(hint, _object(value, at), at)
    return value if _is(hint, value) else _refuse(value, at)


def _is(kind: Any, value: Any) -> bool:
    if kind in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and value in _WHOLE
        return whole or (kind is float and isinstance(value, float))
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _one_of(kinds: tuple[Any, ...], value: Any, at: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    left = [kind for kind in kinds if kind is not type(None)]
    for kind in left[:-1]:
        try:
            return _made(kind, value, at)
        except TypeError:
            continue
    return _made(left[-1], value, at)


def _several(kind: type, kinds: tuple[Any, ...], value: Any, at: str) -> Any:
    """A list, or a tuple of any or of a fixed length."""
    if not isinstance(value, list | tuple):
        _refuse(value, at)
    if kind is list or kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        _refuse(value, at)
    return kind(_made(each, entry, f"{at}.{i}") for i, (each, entry) in enumerate(zip(kinds, value, strict=True)))


def _object(value: Any, at: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        _refuse(value, at)
    return dict(value)


def _keyed(kind: Any, data: dict[str, Any], at: str) -> dict[str, Any]:
    hints = _hints(kind)
    for key, hint in hints.items():
        if key in data:
            data[key] = _made(hint, data[key], f"{at}.{key}")
        elif kind.__total__ and get_origin(hint) is not NotRequired:
            raise TypeError(f"'{f'{at}.{key}'.lstrip('.')}' is missing")
    return data


def _fielded(kind: type, data: dict[str, Any], at: str) -> Any:
    hints, known = _hints(kind), {f.name: f for f in fields(kind)}
    for key in data:
        if key not in known:
            raise TypeError(f"'{f'{at}.{key}'.lstrip('.')}' is not known")
    for name, field in known.items():
        if name not in data and not _optional(field):
            raise TypeError(f"'{f'{at}.{name}'.lstrip('.')}' is missing")
    return kind(**{name: _made(hints[name], value, f"{at}.{name}") for name, value in data.items()})


def _optional(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _refuse(value: Any, at: str) -> Any:
    raise TypeError(f"'{at.lstrip('.')}' is {str(value)[:80]!r}")
