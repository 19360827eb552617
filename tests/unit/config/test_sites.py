"""Sites: found, extended, recognised."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpcresume.cli.site import site as site_command
from hpcresume.config import data_dir, find_site, identify_site, site_names, site_settings
from hpcresume.errors import ConfigError, InternalError


def test_every_shipped_site_loads(environ):
    """No shipped site has a wrong key, and each says what it is."""
    names = site_names(environ)
    assert {"generic", "testbed"} <= set(names)
    for name in names:
        assert name == site_settings(name, environ).site_name
        assert find_site(name, environ).description


def test_a_site_extends_another(load, write):
    """What the extended site says holds where the extending one is silent."""
    write("sites/base/site.toml", "[request]\naccount = 'base'\nqos = 'base'\n")
    path = write("sites/mine/site.toml", "extends = 'base'\n[request]\nqos = 'mine'\n")
    resolved = load(site="mine")
    assert ("base", "mine") == (resolved.settings.request.account, resolved.settings.request.qos)
    assert str(path) == resolved.origins["request.qos"]
    names = [folder.name for folder in resolved.template_dirs]
    assert ["mine", "base", "templates"] == names


def test_a_user_site_of_a_shipped_name_is_laid_over_it(load, write, environ, tmp_path):
    """Of several folders in the site path the first counts most."""
    write("sites/testbed/site.toml", "[run]\nmax_rounds = 1\nmax_attempts = 7\n")
    write("first/testbed/site.toml", "[run]\nmax_rounds = 2\n")
    path = f"{tmp_path / 'first'}:{environ['HPCRESUME_SITE_PATH']}"
    settings = load(site="testbed", HPCRESUME_SITE_PATH=path).settings
    assert (2, 7, 5) == (
        settings.run.max_rounds,
        settings.run.max_attempts,
        settings.site.kill_wait_s,
    )


def test_a_circle_of_extends_is_refused(load, write):
    """Sites that extend each other are an error that shows the circle."""
    write("sites/a/site.toml", "extends = 'b'\n")
    write("sites/b/site.toml", "extends = 'a'\n")
    with pytest.raises(ConfigError, match="a -> b -> a"):
        load(site="a")


@pytest.mark.parametrize("name", ["testbet", "../generic", "", "nowhere-at-all"])
def test_an_unknown_site_is_refused(environ, name):
    """The message names the nearest site or all of them."""
    with pytest.raises(ConfigError, match=r"no site .*(generic|testbed)"):
        find_site(name, environ)


def test_a_site_cannot_name_itself(load, write):
    """The folder's name is the site's name."""
    write("sites/mine/site.toml", "[site]\nname = 'other'\n")
    with pytest.raises(ConfigError, match=r"site\.name is the name of the file's folder"):
        load(site="mine")


def test_identify_mistakes_are_refused(load, write):
    """An unknown way to recognise a site is an error, not a site that is never found."""
    write("sites/mine/site.toml", "[site.identify]\nhost = 'x'\n")
    with pytest.raises(ConfigError, match=r"site\.identify.*host"):
        load(site="mine")


def test_a_site_is_recognised_by_variable_and_by_cluster_name(environ, write):
    """Everything that a site gives has to match; wildcards and other case do."""
    write("sites/env/site.toml", "[site.identify]\nenv = {CENTRE_HOST = 'big*'}\n")
    write("sites/name/site.toml", "[site.identify]\ncluster_name = 'Small'\n")
    write(
        "sites/both/site.toml",
        "[site.identify]\ncluster_name = 'third'\nenv = {CENTRE_HOST = 'third'}\n",
    )
    assert ("env", "CENTRE_HOST=Big-1") == identify_site(environ | {"CENTRE_HOST": "Big-1"})
    assert ("name", "ClusterName=small") == identify_site(environ | {"SLURM_CLUSTER_NAME": "small"})
    assert "name" == identify_site(environ, cluster_name="small")[0]
    assert "generic" == identify_site(environ, cluster_name="third")[0]
    third = environ | {"CENTRE_HOST": "third"}
    assert "both" == identify_site(third, cluster_name="third")[0]


def test_a_site_that_is_not_recognised_is_read_no_further(load, write):
    """A mistake in another site's settings, or in what it extends, stops nobody."""
    write("sites/other/site.toml", "extends = 'none'\n[request]\nno_such_key = 1\n")
    write("sites/mine/site.toml", "[site.identify]\ncluster_name = 'here'\n")
    assert "mine" == load(SLURM_CLUSTER_NAME="here").site_name
    with pytest.raises(ConfigError, match="no_such_key"):
        load(site="other")


def test_the_cluster_name_is_read_from_slurm_conf(environ, write):
    """Where no variable tells, Slurm's configuration does."""
    conf = write("slurm.conf", "# ClusterName=no\n  clustername = yes  # here\nNodeName=a\n")
    write("sites/mine/site.toml", "[site.identify]\ncluster_name = 'yes'\n")
    del environ["SLURM_CLUSTER_NAME"]
    assert ("mine", "ClusterName=yes") == identify_site(environ | {"SLURM_CONF": str(conf)})
    missing = {"SLURM_CONF": str(conf.with_name("none"))}
    assert "generic" == identify_site(environ | missing)[0]


def test_two_matching_sites_are_an_error_that_names_both(load, write):
    """Which of two unrelated sites holds is not guessed; --site and HPCRESUME_SITE decide."""
    for name in ("one", "two"):
        write(f"sites/{name}/site.toml", "[site.identify]\nenv = {CENTRE_HOST = 'x'}\n")
    with pytest.raises(ConfigError, match=r"'one' .* and 'two' .*--site"):
        load(CENTRE_HOST="x")
    assert "two" == load(CENTRE_HOST="x", site="two").site_name
    chosen = load(CENTRE_HOST="x", HPCRESUME_SITE="one")
    assert "environment HPCRESUME_SITE" == chosen.origins["site.name"]


def test_the_extending_site_wins_over_the_one_it_extends(load, write):
    """A user's refinement of a site is recognised instead of it, where both match."""
    write("sites/base/site.toml", "[site.identify]\nenv = {CENTRE_HOST = 'x'}\n")
    write("sites/mine/site.toml", "extends = 'base'\n[site.identify]\nenv = {CENTRE_HOST = 'x'}\n")
    resolved = load(CENTRE_HOST="x")
    assert ("mine", "CENTRE_HOST=x") == (resolved.site_name, resolved.origins["site.name"])


def test_data_is_found_in_a_wheel_and_in_a_checkout(tmp_path):
    """The wheel's copy counts where there is one; without any the install is broken."""
    package = tmp_path / "lib" / "hpcresume"
    (tmp_path / "lib" / "site").mkdir(parents=True)
    assert tmp_path / "lib" / "site" == data_dir("site", package=package)
    (package / "_data" / "site").mkdir(parents=True)
    assert package / "_data" / "site" == data_dir("site", package=package)
    with pytest.raises(InternalError, match="templates"):
        data_dir("templates", package=package)


def test_site_list_shows_where_we_are(environ, write):
    """`site list` marks the recognised site; --json is one object."""
    write("sites/mine/site.toml", "description = 'Ours'\n[site.identify]\ncluster_name = 'here'\n")
    environ["SLURM_CLUSTER_NAME"] = "here"
    runner = CliRunner(env=environ)
    text = runner.invoke(site_command, ["list"])
    assert 0 == text.exit_code
    assert re.search(r"(?m)^\* mine +Ours$", text.stdout)
    data = json.loads(runner.invoke(site_command, ["list", "--json"]).stdout)
    assert (1, "mine") == (data["schema"], data["here"])
    mine = next(entry for entry in data["sites"] if entry["name"] == "mine")
    assert not mine["shipped"]
    assert Path(mine["files"][-1]).is_file()


def test_site_show_gives_each_setting_with_its_file(environ):
    """`site show` has every setting, its value and its origin."""
    runner = CliRunner(env=environ)
    text = runner.invoke(site_command, ["show", "testbed"])
    assert 0 == text.exit_code
    (line,) = [line for line in text.stdout.splitlines() if line.startswith("site.kill_wait_s")]
    assert ["site.kill_wait_s", "5"] == line.split()[:2]
    assert line.endswith("testbed/site.toml")
    data = json.loads(runner.invoke(site_command, ["show", "testbed", "--json"]).stdout)
    assert 5 == data["settings"]["site.kill_wait_s"]["value"]
