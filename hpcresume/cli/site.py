"""``hpcresume site``: which sites there are, what one says, and whether Slurm agrees."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpcresume.cli.common import emit_json, finish, json_option, say
from hpcresume.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from hpcresume.config import Site
    from hpcresume.launch.site_check import Finding


@click.group()
def site() -> None:
    """Show the sites that settings can come from; compare one with the live Slurm.

    \b
    Example:
      hpcresume site list
      hpcresume site show generic
      hpcresume site check
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


@site.command("check")
@click.argument("name", required=False)
@json_option
def check(name: str | None, as_json: bool) -> None:
    """Compare the site NAME with the live Slurm, without submitting anything.

    Without NAME: the site that this machine is recognised as.  Each setting is reported as
    ok, wrong with the line to write, or unknown with the reason.  Account, partition and
    the like come from your own settings, as they do for submit.

    Exits 15 if anything is wrong, 30 or 31 where no Slurm answers.

    \b
    Example:
      hpcresume site check
      hpcresume site check perlmutter --json
    """
    from hpcresume.config import load_settings
    from hpcresume.launch.live import ask
    from hpcresume.launch.site_check import check_site

    live = ask()
    resolved = load_settings(
        site=name,
        start_dir=Path.cwd(),
        environ=os.environ,
        flags={},
        cluster_name=live.cluster_name,
    )
    findings = check_site(resolved, live)
    wrong = [finding for finding in findings if finding.state == "wrong"]
    if as_json:
        rows = [asdict(finding) for finding in findings]
        emit_json({"site": resolved.site_name, "cluster": live.cluster_name, "findings": rows})
    else:
        _show_findings(findings)
        say(f"{resolved.site_name} on {live.cluster_name}: {len(wrong)} wrong", err=True)
    if wrong:
        finish(ConfigError.exit_code)


@site.command("new")
@click.argument("name")
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of sites.  [default: the first of $HPCRESUME_SITE_PATH]",
)
def new(name: str, directory: Path | None) -> None:
    """Write a first site.toml for the site NAME from what the live Slurm answers.

    What is there already is never overwritten.

    \b
    Example:
      hpcresume site new mycluster --dir ~/sites
      export HPCRESUME_SITE_PATH=~/sites
      hpcresume site check mycluster
    """
    from hpcresume.launch.live import ask
    from hpcresume.launch.site_new import new_site

    paths = [entry for entry in os.environ.get("HPCRESUME_SITE_PATH", "").split(":") if entry]
    if directory is None and not paths:
        raise UsageError(
            "no folder of sites is known: HPCRESUME_SITE_PATH is not set. "
            "Say where the new site goes with --dir DIR"
        )
    folder = directory or Path(paths[0])
    say(str(new_site(name, folder, ask())))
    if str(folder.expanduser().absolute()) not in map(_absolute, paths):
        say(f"# to use it: export HPCRESUME_SITE_PATH={_absolute(str(folder))}", err=True)
    say(f"# next: hpcresume site check {name}", err=True)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _show_findings(findings: list[Finding]) -> None:
    width = max(len(finding.key) for finding in findings)
    for finding in findings:
        value = "" if finding.value is None else f"{json.dumps(finding.value)}: "
        say(f"{finding.state:<7}  {finding.key:<{width}}  {value}{finding.reason}")
        if finding.state == "wrong":
            if finding.origin:
                say(f"{'':<7}  {'':<{width}}  from {finding.origin}")
            if finding.write:
                say(f"{'':<7}  {'':<{width}}  write {finding.write}")


def _row(found: Site) -> dict[str, Any]:
    return {
        "name": found.name,
        "description": found.description,
        "extends": list(found.ancestors),
        "files": [str(file.directory / "site.toml") for file in found.files],
        "shipped": all(file.shipped for file in found.own),
    }
