"""Layers of settings: one file, the environment, or the command line, each with its origin.

A layer is checked on its own, before layers are laid over each other, so that an error
names the place the value came from.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from hpcresume.config.files import refuse_control_characters, suggestion
from hpcresume.config.settings import Settings
from hpcresume.errors import ConfigError

_SLURM_VARIABLES = {
    "SBATCH_ACCOUNT": ("request", "account"),
    "SBATCH_PARTITION": ("request", "partition"),
    "SBATCH_QOS": ("request", "qos"),
    "SBATCH_TIMELIMIT": ("request", "time"),
}
_PREFIX = "HPCRESUME_"


class Layer(msgspec.Struct, frozen=True):
    """Values of some settings by section and key, and where they came from by ``section.key``."""

    values: dict[str, dict[str, Any]]
    origins: dict[str, str]


@cache
def schema() -> dict[str, dict[str, Any]]:
    """Return the type of every setting, by section and key."""
    sections = get_type_hints(Settings)
    return {name: get_type_hints(kind, include_extras=True) for name, kind in sections.items()}


def layer_of(data: Mapping[str, Any], *, origin: str) -> Layer:
    """Check a nested mapping of settings and return it as a layer.

    Raises:
        ConfigError: An unknown section or key (with the nearest known one), or a value of
            the wrong type, each with ``origin``.
    """
    values: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    for section, key, value in _entries(data, origin=origin):
        values.setdefault(section, {})[key] = convert(section, key, value, origin=origin)
        origins[f"{section}.{key}"] = origin
    return Layer(values, origins)


def environment_layer(environ: Mapping[str, str]) -> Layer:
    """Return what the environment sets: sbatch's four variables, then ``HPCRESUME_SECTION__KEY``.

    A list is written as shell words, a number or a boolean as in TOML.

    Raises:
        ConfigError: As :func:`layer_of`, with the variable as the origin.
    """
    values: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    for variable, section, key in _variables(environ):
        origin = f"environment {variable}"
        values.setdefault(section, {})[key] = _from_text(section, key, environ[variable], origin)
        origins[f"{section}.{key}"] = origin
    return Layer(values, origins)


def convert(section: str, key: str, value: object, *, origin: str, strict: bool = True) -> Any:
    """Return a value converted to its setting's type.

    Raises:
        ConfigError: Unknown section or key, a control character, or the wrong type.
    """
    kind = _kind(section, key, origin=origin)
    refuse_control_characters(value, key=f"{section}.{key}", origin=origin)
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{section}.{key} = {value!r} ({origin}): {_expectation(kind) or error}. Correct it",
            key=f"{section}.{key}",
            value=value,
            origin=origin,
        ) from error


def _entries(data: Mapping[str, Any], *, origin: str) -> Iterator[tuple[str, str, Any]]:
    for section, entries in data.items():
        if section not in schema():
            raise _unknown(f"section [{section}]", section, schema(), origin=origin)
        if not isinstance(entries, Mapping):
            raise ConfigError(
                f"{section} = {entries!r} ({origin}): expected a table of settings. "
                f"Write [{section}] and one setting a line below it",
                key=section,
                origin=origin,
            )
        for key, value in entries.items():
            yield section, key, value


def _variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for variable, (section, key) in _SLURM_VARIABLES.items():
        if environ.get(variable):
            yield variable, section, key
    for variable in sorted(environ):
        if variable.startswith(_PREFIX) and "__" in variable:
            section, key = variable.removeprefix(_PREFIX).lower().split("__", 1)
            yield variable, section, key


def _from_text(section: str, key: str, text: str, origin: str) -> Any:
    if get_origin(_kind(section, key, origin=origin)) is not list:
        return convert(section, key, text, origin=origin, strict=False)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"{section}.{key} = {text!r} ({origin}): {error}. A list is written as shell words",
            key=f"{section}.{key}",
            origin=origin,
        ) from error
    return convert(section, key, words, origin=origin)


def _kind(section: str, key: str, *, origin: str) -> Any:
    if section not in schema():
        raise _unknown(f"section [{section}]", section, schema(), origin=origin)
    if key not in schema()[section]:
        raise _unknown(f"key {section}.{key}", key, schema()[section], origin=origin)
    return schema()[section][key]


def _unknown(what: str, word: str, known: Mapping[str, object], *, origin: str) -> ConfigError:
    return ConfigError(
        f"{origin}: unknown {what}. It would have no effect. {suggestion(word, known)}",
        key=word,
        origin=origin,
    )


def _expectation(kind: Any) -> str:
    """Return what a setting's type asks for in words, where its declaration says so."""
    if get_origin(kind) is list:
        inner = _expectation(get_args(kind)[0])
        return inner.replace("expected ", "expected a list, each entry ") if inner else ""
    if get_origin(kind) is Literal:
        return f"expected one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) is not Annotated:
        return ""
    metas = [meta for meta in get_args(kind)[1:] if isinstance(meta, msgspec.Meta)]
    words = [meta.description for meta in metas if meta.description]
    return f"expected {words[0]}" if words else ""
