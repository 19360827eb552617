"""``hpcresume site``: which sites there are and what one of them says."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hpcresume.config import Site


@click.group()
def site() -> None:
    """Show the sites that settings can come from.

    \b
    Example:
      hpcresume site list
      hpcresume site show generic
    """


@site.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def list_sites(as_json: bool) -> None:
    """List the shipped sites and those of $HPCRESUME_SITE_PATH.

    A star marks the one that this machine is recognised as.

    \b
    Example:
      hpcresume site list --json
    """
    from hpcresume.config import find_site, identify_site, site_names

    here, how = identify_site(os.environ)
    rows = [_row(find_site(name, os.environ)) for name in site_names(os.environ)]
    if as_json:
        click.echo(json.dumps({"schema": 1, "here": here, "because": how, "sites": rows}))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        mark = "*" if row["name"] == here else " "
        click.echo(f"{mark} {row['name']:<{width}}  {row['description']}".rstrip())
    click.echo(f"* {here}: {how}", err=True)


@site.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def show(name: str, as_json: bool) -> None:
    """Show every setting of the site NAME, with the file it comes from.

    User, project, environment and command line are left out: they are laid over the site.

    \b
    Example:
      hpcresume site show generic --json
    """
    from hpcresume.config import find_site, site_settings

    resolved = site_settings(name, os.environ)
    found = find_site(name, os.environ)
    explained = resolved.explain()
    if as_json:
        settings = {row.key: {"value": row.value, "origin": row.origin} for row in explained}
        click.echo(json.dumps({"schema": 1, **_row(found), "settings": settings}))
        return
    width = max(len(row.key) for row in explained)
    values = {row.key: json.dumps(row.value) for row in explained}
    value_width = max(map(len, values.values()))
    for row in explained:
        click.echo(f"{row.key:<{width}}  {values[row.key]:<{value_width}}  {row.origin}")


def _row(found: Site) -> dict[str, Any]:
    return {
        "name": found.name,
        "description": found.description,
        "extends": list(found.ancestors),
        "files": [str(file.directory / "site.toml") for file in found.files],
        "shipped": all(file.shipped for file in found.own),
    }
