"""Parameters of a ``pipeline()`` function: texts and JSON values converted by annotation.

What is converted here comes from ``-P name=value`` (texts), from a parameter file
(typed), or from a run's own record of an earlier submission (JSON values).  The last two
go through the same conversion, so that converting twice changes nothing.
"""

from __future__ import annotations

import collections.abc
import datetime as dt
import difflib
import enum
import hashlib
import inspect
import json
import os
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

from hpcresume.errors import PipelineError, UsageError

_TRUE = frozenset({"true", "yes", "1"})
_FALSE = frozenset({"false", "no", "0"})
_SEQUENCES = (list, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping)


def convert_parameters(fn: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert parameters by the annotations of the function that takes them.

    A parameter without annotation takes its default's type.

    Args:
        fn: The function; its annotations may be strings.
        given: Texts, or values that are of the right type already.

    Returns:
        What was given, converted; defaults are not filled in.

    Raises:
        UsageError: A parameter is unknown or missing, or a value does not convert.
        PipelineError: An annotation cannot be evaluated.
    """
    parameters = inspect.signature(fn).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if not takes_any:
        _refuse_unknown(given, named)
    _refuse_missing(given, named)
    return {
        name: _converted(fn, named[name], value) if name in named else value
        for name, value in given.items()
    }


def read_params_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read parameters from a ``.json`` or ``.toml`` file.

    Raises:
        UsageError: The file cannot be read, or does not hold names and values.
    """
    path = Path(path)
    parse = {".json": json.loads, ".toml": tomllib.loads}.get(path.suffix.lower())
    if parse is None:
        raise UsageError(f"{path}: parameters are read from .json and .toml files.")
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"{path}: not {path.suffix[1:].upper()}: {error}.") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds a {type(values).__name__}. Write names and values.")
    return values


def parameter_digest(params: Mapping[str, Any]) -> str:
    """Return 8 hexadecimal digits that tell one set of parameters from another."""
    text = json.dumps(to_json(dict(params)), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def to_json(value: Any) -> Any:
    """Return a converted parameter as the JSON value that converts to it again.

    Raises:
        UsageError: There is none.
    """
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): to_json(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [to_json(inner) for inner in value]
    raise UsageError(
        f"a parameter has the value {value!r} of type {type(value).__qualname__}. "
        "Parameters are recorded with the run as JSON. "
        "Give a text, a number, a list or a mapping."
    )


def _refuse_unknown(given: Mapping[str, Any], named: Mapping[str, inspect.Parameter]) -> None:
    for name in given:
        if name in named:
            continue
        near = difflib.get_close_matches(name, named, n=1)
        suggestion = f" Did you mean {near[0]!r}?" if near else ""
        known = f"Give one of: {', '.join(named)}." if named else "It takes none: run without -P."
        raise UsageError(
            f"the pipeline has no parameter {name!r}.{suggestion} {known}", parameter=name
        )


def _refuse_missing(given: Mapping[str, Any], named: Mapping[str, inspect.Parameter]) -> None:
    missing = [n for n, p in named.items() if p.default is p.empty and n not in given]
    if missing:
        options = " ".join(f"-P {name}=..." for name in missing)
        raise UsageError(
            f"the pipeline needs {', '.join(map(repr, missing))}, which has no default. "
            f"Give {options}",
            parameters=missing,
        )


def _converted(fn: Callable[..., Any], parameter: inspect.Parameter, value: Any) -> Any:
    wanted = _annotation(fn, parameter)
    try:
        return _convert(value, wanted)
    except (ValueError, TypeError) as error:
        detail = f" ({error})" if str(error) else ""
        raise UsageError(
            f"parameter {parameter.name!r}: {value!r} is not {_type_text(wanted)}{detail}. "
            f"Give one that is: -P {parameter.name}=...",
            parameter=parameter.name,
            value=repr(value),
        ) from error


def _annotation(fn: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    if parameter.annotation is parameter.empty:
        unknown = parameter.default is parameter.empty or parameter.default is None
        return Any if unknown else type(parameter.default)
    # One at a time: a return type imported only for type checkers must not matter.
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    scope = getattr(inspect.unwrap(fn), "__globals__", {})
    try:
        return typing.get_type_hints(holder, globalns=scope)[parameter.name]
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise PipelineError(
            f"parameter {parameter.name!r}: its annotation {parameter.annotation!r} cannot be "
            f"evaluated: {error}. Values are converted by it. "
            "Import the type where the pipeline's file is run, not only for type checkers."
        ) from error


def _convert(value: Any, wanted: Any) -> Any:
    if isinstance(wanted, typing.NewType):
        return _convert(value, wanted.__supertype__)
    if wanted is Any or wanted is inspect.Parameter.empty:
        return value
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(wanted))
    if origin is Literal:
        return _convert_literal(value, get_args(wanted))
    base = origin or wanted
    if base in _SEQUENCES:
        return [_convert(v, (get_args(wanted) or (Any,))[0]) for v in _split(value)]
    if base is tuple:
        return _convert_tuple(value, get_args(wanted))
    if base in _MAPPINGS:
        return _convert_mapping(value, get_args(wanted))
    return _convert_plain(value, base)


def _convert_plain(value: Any, wanted: Any) -> Any:
    if wanted in _PLAIN:
        return _PLAIN[wanted](value)
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return _convert_enum(value, wanted)
    if isinstance(wanted, type) and isinstance(value, wanted):
        return value
    raise ValueError("values of this type cannot be given as parameters")


def _to_int(value: Any) -> int:
    if isinstance(value, str):
        return int(value.strip())
    return int(_same(value, int))


def _to_float(value: Any) -> float:
    if isinstance(value, str):
        return float(value)
    return float(_same(value, int | float))


def _to_bool(value: Any) -> bool:
    if isinstance(value, str):
        text = value.strip().lower()
        if text not in _TRUE | _FALSE:
            raise ValueError("write true or false")
        return text in _TRUE
    if not isinstance(value, bool):
        raise TypeError
    return value


def _to_str(value: Any) -> str:
    return str(_same(value, str))


def _to_path(value: Any) -> Path:
    return Path(_same(value, str | os.PathLike)).expanduser()


def _to_none(value: Any) -> None:
    if value is not None and str(value).strip().lower() not in ("none", "null"):
        raise ValueError


def _to_date(value: Any) -> dt.date:
    if isinstance(value, str):
        return dt.date.fromisoformat(value)
    if isinstance(value, dt.datetime):
        raise TypeError
    return typing.cast("dt.date", _same(value, dt.date))


def _to_datetime(value: Any) -> dt.datetime:
    if isinstance(value, str):
        return dt.datetime.fromisoformat(value)
    return typing.cast("dt.datetime", _same(value, dt.datetime))


def _same(value: Any, wanted: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise TypeError
    return value


_PLAIN: dict[Any, Callable[[Any], Any]] = {
    int: _to_int,
    float: _to_float,
    bool: _to_bool,
    str: _to_str,
    Path: _to_path,
    os.PathLike: _to_path,
    type(Path()): _to_path,
    NoneType: _to_none,
    dt.date: _to_date,
    dt.datetime: _to_datetime,
}


def _convert_union(value: Any, members: Sequence[Any]) -> Any:
    """Try the members in order, but ``str`` last, as every text is one."""
    if not isinstance(value, str):
        for member in members:
            if isinstance(member, type) and type(value) is member:
                return value
    for member in sorted(members, key=lambda m: m is str):
        try:
            return _convert(value, member)
        except (ValueError, TypeError):
            continue
    raise ValueError


def _convert_literal(value: Any, choices: Sequence[Any]) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    for choice in choices:
        if isinstance(value, str) and str(choice) == value:
            return choice
    raise ValueError


def _convert_enum(value: Any, wanted: type[enum.Enum]) -> enum.Enum:
    if isinstance(value, wanted):
        return value
    if isinstance(value, str) and value in wanted.__members__:
        return wanted[value]
    for member in wanted:
        if value == member.value or (isinstance(value, str) and value == str(member.value)):
            return member
    raise ValueError


def _convert_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    parts = _split(value)
    if not kinds or kinds[-1] is Ellipsis:
        return tuple(_convert(part, (kinds or (Any,))[0]) for part in parts)
    if len(parts) != len(kinds):
        raise ValueError(f"{len(parts)} values")
    return tuple(_convert(part, kind) for part, kind in zip(parts, kinds, strict=True))


def _convert_mapping(value: Any, kinds: tuple[Any, ...]) -> dict[Any, Any]:
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, Mapping):
        raise TypeError
    key_kind, value_kind = kinds or (Any, Any)
    return {_convert(k, key_kind): _convert(v, value_kind) for k, v in value.items()}


def _split(value: Any) -> list[Any]:
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            return typing.cast("list[Any]", json.loads(value))
        return [part.strip() for part in value.split(",")] if value.strip() else []
    if not isinstance(value, list | tuple):
        raise TypeError
    return list(value)


def _type_text(wanted: Any) -> str:
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(map(str, get_args(wanted)))}"
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return f"one of {', '.join(wanted.__members__)}"
    if isinstance(wanted, type) and get_origin(wanted) is None:
        return f"of type {wanted.__name__}"
    return f"of type {str(wanted).replace('typing.', '')}"
