"""Every setting from all its layers, each with where it came from.

From the lowest to the highest: ``templates/default.toml``, the shipped site, the sites of
``$HPCRESUME_SITE_PATH``, the user's ``config.toml``, the project, the environment, the
command line.  A higher layer replaces a value whole, lists included.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from hpcresume.config.files import read_toml, refuse_untrusted, untrusted_reason
from hpcresume.config.layers import Layer, environment_layer, layer_of, schema
from hpcresume.config.resources import data_dir
from hpcresume.config.settings import Settings
from hpcresume.config.sites import Site, find_site, identify_site
from hpcresume.errors import ConfigError, InternalError

_COMMAND_LINE = "command line"
_RUNS_IN_THE_SHELL = ("site.setup", "site.python")


class Explained(NamedTuple):
    """One setting: ``section.key``, its value, and the layer that gave it."""

    key: str
    value: Any
    origin: str


class Resolved(msgspec.Struct, frozen=True):
    """The settings of a run, where each came from, and the folders its templates are in."""

    settings: Settings
    origins: dict[str, str]
    site_name: str
    template_dirs: tuple[Path, ...]

    def explain(self) -> list[Explained]:
        """Return every setting with its origin, in the order of the sections."""
        return [
            Explained(f"{section}.{key}", value, self.origins[f"{section}.{key}"])
            for section, values in msgspec.to_builtins(self.settings).items()
            for key, value in values.items()
        ]


def load_settings(
    *,
    site: str | None,
    start_dir: Path,
    environ: Mapping[str, str],
    flags: Mapping[str, Mapping[str, Any]],
    cluster_name: str = "",
) -> Resolved:
    """Resolve every setting.

    Args:
        site: Name of a site; without one ``HPCRESUME_SITE`` decides, then what the
            environment and Slurm's ClusterName identify, then ``generic``.
        start_dir: Where the search for the project's file starts, upward.
        environ: Environment variables.
        flags: Values from the command line by section and key; None means not given.
        cluster_name: Slurm's ClusterName where the caller has asked Slurm.

    Raises:
        ConfigError: A site that is unknown or ambiguous, an unknown key, a wrong value, or
            a file that another user can write; the message names where it came from.
    """
    chosen, how = _choose_site(site, environ, cluster_name=cluster_name)
    found = find_site(chosen, environ)
    given = {
        section: {key: value for key, value in entries.items() if value is not None}
        for section, entries in flags.items()
    }
    layers = [
        *_user_layers(environ),
        *_project_layers(start_dir),
        environment_layer(environ),
        layer_of(given, origin=_COMMAND_LINE),
    ]
    return _resolve(found, how, layers)


def site_settings(name: str, environ: Mapping[str, str]) -> Resolved:
    """Return what a site says over the defaults, without user, project, environment and flags.

    Raises:
        ConfigError: As :func:`load_settings`.
    """
    return _resolve(find_site(name, environ), "asked for", [])


def _resolve(site: Site, how: str, layers: list[Layer]) -> Resolved:
    defaults = data_dir("templates") / "default.toml"
    below = [
        layer_of(read_toml(defaults), origin="default"),
        *(file.layer for file in site.files),
    ]
    name = Layer({"site": {"name": site.name}}, {"site.name": how})
    values, origins = _lay([*below, *layers, name])
    folders = (*site.template_dirs, data_dir("templates"))
    return Resolved(_settings(values), origins, site.name, folders)


def _choose_site(
    site: str | None, environ: Mapping[str, str], *, cluster_name: str
) -> tuple[str, str]:
    if site:
        return site, "chosen with --site"
    if environ.get("HPCRESUME_SITE"):
        return environ["HPCRESUME_SITE"], "environment HPCRESUME_SITE"
    return identify_site(environ, cluster_name=cluster_name)


def _lay(layers: list[Layer]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    values: dict[str, dict[str, Any]] = {section: {} for section in schema()}
    origins: dict[str, str] = {}
    for layer in layers:
        origins |= layer.origins
        for section, entries in layer.values.items():
            values[section] |= entries
    return values, origins


def _settings(values: dict[str, dict[str, Any]]) -> Settings:
    try:
        return msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        raise InternalError(
            f"templates/default.toml does not hold every setting: {error}"
        ) from error


def _user_layers(environ: Mapping[str, str]) -> Iterator[Layer]:
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "~"), ".config")
    path = Path(home).expanduser() / "hpcresume" / "config.toml"
    if path.is_file():
        refuse_untrusted(path)
        yield layer_of(read_toml(path), origin=str(path))


def _project_layers(start_dir: Path) -> Iterator[Layer]:
    """Yield the nearest project's settings: ``hpcresume.toml`` before ``pyproject.toml``."""
    start = start_dir.expanduser().absolute()
    for folder in (start, *start.parents):
        path = folder / "hpcresume.toml"
        if path.is_file():
            yield _project_layer(path, read_toml(path), origin=str(path))
            return
        path = folder / "pyproject.toml"
        if path.is_file():
            table = read_toml(path).get("tool", {}).get("hpcresume")
            if table is not None:
                yield _project_layer(path, table, origin=f"{path} [tool.hpcresume]")
                return


def _project_layer(path: Path, data: dict[str, Any], *, origin: str) -> Layer:
    layer = layer_of(data, origin=origin)
    shell = [key for key in _RUNS_IN_THE_SHELL if key in layer.origins]
    reason = untrusted_reason(path) if shell else ""
    if reason:
        # A project shared by a group may set an account; it may not run shell lines as us.
        raise ConfigError(
            f"{path} sets {' and '.join(shell)} and {reason}. Those lines run in your jobs, "
            f"as you. Move them to a site file of your own, or: chmod go-w {path}",
            path=str(path),
        )
    return layer
