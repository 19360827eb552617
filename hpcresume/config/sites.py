"""Sites: one centre's settings each, shipped or the user's own, and which one this is.

A site is a folder that holds ``site.toml`` and any ``*.j2`` templates.  Shipped sites lie
in ``site/``, the user's in the folders of ``$HPCRESUME_SITE_PATH``, the first of which
counts most.  A user's site of a shipped name is laid over the shipped one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import msgspec

from hpcresume.config.files import read_toml, refuse_untrusted, suggestion
from hpcresume.config.layers import Layer, layer_of
from hpcresume.config.resources import data_dir
from hpcresume.config.settings import Identify
from hpcresume.errors import ConfigError

GENERIC = "generic"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CLUSTER_NAME = re.compile(r"^\s*ClusterName\s*=\s*(\S+)", re.MULTILINE | re.IGNORECASE)
_SLURM_CONFS = ("/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf")


class SiteFile(msgspec.Struct, frozen=True):
    """One ``site.toml``: its folder, what it says about itself, and the settings it gives."""

    directory: Path
    shipped: bool
    description: str
    extends: str
    identify: Identify
    layer: Layer


class Site(msgspec.Struct, frozen=True):
    """A site with everything it extends: ``files`` from the lowest layer to the highest."""

    name: str
    ancestors: tuple[str, ...]
    files: tuple[SiteFile, ...]
    own: tuple[SiteFile, ...]

    @property
    def description(self) -> str:
        """One line about the site, from the highest of its own files that has one."""
        return next((file.description for file in reversed(self.own) if file.description), "")

    @property
    def identify(self) -> Identify:
        """How the site is recognised, from the highest of its own files that says so."""
        return _highest([file.identify for file in self.own])

    @property
    def template_dirs(self) -> tuple[Path, ...]:
        """Folders that may hold templates, the one that counts most first."""
        return tuple(file.directory for file in reversed(self.files))


def site_names(environ: Mapping[str, str]) -> list[str]:
    """Return the names of all sites, sorted."""
    return sorted({path.name for root, _ in _roots(environ) for path in _site_folders(root)})


def find_site(name: str, environ: Mapping[str, str]) -> Site:
    """Return a site with what it extends.

    Raises:
        ConfigError: No such site, a circle of ``extends``, or a site file that is wrong or
            that another user can write.
    """
    return _find(name, environ, below=())


def identify_site(environ: Mapping[str, str], *, cluster_name: str = "") -> tuple[str, str]:
    """Return the name of the site that this machine is at, and how it was recognised.

    Args:
        environ: Environment variables to recognise it by.
        cluster_name: Slurm's ClusterName where the caller knows it; otherwise that of
            ``SLURM_CLUSTER_NAME`` or of Slurm's configuration file.

    Raises:
        ConfigError: Two sites match and neither extends the other.
    """
    cluster = cluster_name or _cluster_name(environ)
    found: dict[str, tuple[Site, str]] = {}
    for name in site_names(environ):
        evidence = _evidence(_identify_of(name, environ), environ, cluster)
        if evidence:
            found[name] = find_site(name, environ), evidence
    inherited = {ancestor for site, _ in found.values() for ancestor in site.ancestors}
    matches = {name: how for name, (_, how) in found.items() if name not in inherited}
    if len(matches) > 1:
        both = " and ".join(f"{name!r} ({how})" for name, how in matches.items())
        raise ConfigError(
            f"this machine matches the sites {both}. Their settings differ. "
            "Say which one with --site NAME or HPCRESUME_SITE=NAME",
            sites=sorted(matches),
        )
    return next(iter(matches.items()), (GENERIC, "no site matches this machine"))


def _find(name: str, environ: Mapping[str, str], *, below: tuple[str, ...]) -> Site:
    if name in below:
        circle = " -> ".join((*below, name))
        raise ConfigError(f"sites extend each other in a circle: {circle}. Remove one extends")
    own = _own_files(name, environ)
    bases = {file.extends: None for file in own if file.extends}
    parents = [_find(base, environ, below=(*below, name)) for base in bases]
    return Site(
        name,
        ancestors=tuple(n for parent in parents for n in (*parent.ancestors, parent.name)),
        files=(*(file for parent in parents for file in parent.files), *own),
        own=own,
    )


def _own_files(name: str, environ: Mapping[str, str]) -> tuple[SiteFile, ...]:
    files = tuple(_read(path, shipped=shipped) for path, shipped in _own_paths(name, environ))
    if not files:
        raise ConfigError(
            f"there is no site {name!r}. {suggestion(name, site_names(environ))}", site=name
        )
    return files


def _own_paths(name: str, environ: Mapping[str, str]) -> list[tuple[Path, bool]]:
    """Return the files of a site, lowest layer first, each with whether it is shipped."""
    roots = _roots(environ) if _NAME.fullmatch(name) else ()
    paths = [(root / name / "site.toml", shipped) for root, shipped in roots]
    return [(path, shipped) for path, shipped in paths if path.is_file()]


def _identify_of(name: str, environ: Mapping[str, str]) -> Identify:
    """Return how a site is recognised; its settings are not looked at, nor what it extends."""
    return _highest(
        [
            _take_identify(_load(path, shipped=shipped), path)
            for path, shipped in _own_paths(name, environ)
        ]
    )


def _highest(given: list[Identify]) -> Identify:
    return next((identify for identify in reversed(given) if identify != Identify()), Identify())


def _roots(environ: Mapping[str, str]) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of sites, lowest layer first, each with whether it is shipped."""
    yield data_dir("site"), True
    folders = environ.get("HPCRESUME_SITE_PATH", "").split(":")
    for folder in reversed([entry for entry in folders if entry]):
        yield Path(folder).expanduser().absolute(), False


def _site_folders(root: Path) -> list[Path]:
    return [path.parent for path in root.glob("*/site.toml")]


def _load(path: Path, *, shipped: bool) -> dict[str, Any]:
    if not shipped:
        refuse_untrusted(path.parent)
        refuse_untrusted(path)
    return read_toml(path)


def _take_identify(data: dict[str, Any], path: Path) -> Identify:
    """Take out of a site file what its settings do not hold."""
    site = data.get("site")
    if not isinstance(site, dict):
        return Identify()
    if "name" in site:
        raise ConfigError(f"{path}: site.name is the name of the file's folder. Remove it")
    found = _convert(site.pop("identify", {}), Identify, key="site.identify", path=path)
    return cast("Identify", found)


def _read(path: Path, *, shipped: bool) -> SiteFile:
    data = _load(path, shipped=shipped)
    identify = _take_identify(data, path)
    description = _convert(data.pop("description", ""), str, key="description", path=path)
    extends = _convert(data.pop("extends", ""), str, key="extends", path=path)
    layer = layer_of(data, origin=str(path))
    return SiteFile(path.parent, shipped, description, extends, identify, layer)


def _convert(value: object, kind: Any, *, key: str, path: Path) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{key} = {value!r} ({path}): {error}. Correct it") from error


def _evidence(identify: Identify, environ: Mapping[str, str], cluster: str) -> str:
    """Return what matched, or the empty string where anything given does not match."""
    found = []
    for variable, pattern in identify.env.items():
        value = environ.get(variable)
        if value is None or not fnmatchcase(value.lower(), pattern.lower()):
            return ""
        found.append(f"{variable}={value}")
    if identify.cluster_name:
        if not fnmatchcase(cluster.lower(), identify.cluster_name.lower()):
            return ""
        found.append(f"ClusterName={cluster}")
    return ", ".join(found)


def _cluster_name(environ: Mapping[str, str]) -> str:
    if environ.get("SLURM_CLUSTER_NAME"):
        return environ["SLURM_CLUSTER_NAME"]
    given = environ.get("SLURM_CONF")
    for path in map(Path, [given] if given else _SLURM_CONFS):
        try:
            match = _CLUSTER_NAME.search(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        return match[1] if match else ""
    return ""
