"""Which layer a setting comes from, and that it says so."""

from __future__ import annotations

import msgspec
import pytest

from hpcresume.config.layers import schema
from hpcresume.errors import ConfigError

LAYERS = [
    ("sites/generic/site.toml", "[request]\naccount = 'site path'\n"),
    ("home/.config/hpcresume/config.toml", "[request]\naccount = 'user'\n"),
    ("project/pyproject.toml", "[tool.hpcresume.request]\naccount = 'pyproject'\n"),
    ("project/deep/hpcresume.toml", "[request]\naccount = 'project'\n"),
]


def _account(resolved):
    return resolved.settings.request.account, resolved.origins["request.account"]


def test_defaults_give_every_setting(load):
    """templates/default.toml holds every key of every section but the site's name."""
    resolved = load()
    expected = {f"{section}.{key}" for section, keys in schema().items() for key in keys}
    assert expected == set(resolved.origins)
    assert {"default"} == {o for key, o in resolved.origins.items() if key != "site.name"}
    assert "generic" == resolved.settings.site.name == resolved.site_name


def test_each_layer_beats_the_one_below(load, write, tmp_path):
    """Adding a higher layer changes the value and its origin, every time."""
    seen = [_account(load())]
    for name, text in LAYERS:
        path = write(name, text)
        seen.append(_account(load()))
        assert str(path) in seen[-1][1]
    environment = {"SBATCH_ACCOUNT": "sbatch"}
    seen.append(_account(load(**environment)))
    environment["HPCRESUME_REQUEST__ACCOUNT"] = "variable"
    seen.append(_account(load(**environment)))
    seen.append(_account(load(**environment, flags={"request": {"account": "flag"}})))
    values = ["", "site path", "user", "pyproject", "project", "sbatch", "variable", "flag"]
    assert values == [value for value, _ in seen]
    assert [
        "environment SBATCH_ACCOUNT",
        "environment HPCRESUME_REQUEST__ACCOUNT",
        "command line",
    ] == [origin for _, origin in seen[-3:]]


def test_explain_names_every_setting_once(load, write):
    """explain() has one row per setting, with the value and the layer it came from."""
    path = write("home/.config/hpcresume/config.toml", "[sync]\nmax_age_s = 7\n")
    rows = load(HPCRESUME_TASK__WORKERS="3").explain()
    assert sum(map(len, schema().values())) == len({row.key for row in rows}) == len(rows)
    by_key = {row.key: row for row in rows}
    assert ("sync.max_age_s", 7.0, str(path)) == by_key["sync.max_age_s"]
    assert ("task.workers", 3, "environment HPCRESUME_TASK__WORKERS") == by_key["task.workers"]


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("SYNC__MAX_AGE_S", "5", 5.0),
        ("TASK__WORKERS", "4", 4),
        ("SITE__ARRAYS", "false", False),
        ("SITE__SETUP", "'module load a' 'module load b'", ["module load a", "module load b"]),
        ("REQUEST__EXTRA", "--comment=x --exclusive", ["--comment=x", "--exclusive"]),
        ("REQUEST__CONSTRAINT", "gpu&hbm80g", "gpu&hbm80g"),
    ],
)
def test_environment_values_take_the_setting_type(load, variable, text, expected):
    """HPCRESUME_SECTION__KEY is converted to the type of the setting."""
    resolved = load(**{f"HPCRESUME_{variable}": text})
    section, key = variable.lower().split("__")
    assert expected == msgspec.to_builtins(resolved.settings)[section][key]


def test_slurm_variables_set_the_request(load):
    """sbatch's own variables mean what they mean to sbatch; an empty one means nothing."""
    request = load(
        SBATCH_ACCOUNT="", SBATCH_PARTITION="long", SBATCH_QOS="q", SBATCH_TIMELIMIT="1-00"
    ).settings.request
    assert ("", "long", "q", "1-00") == (
        request.account,
        request.partition,
        request.qos,
        request.time,
    )


def test_a_flag_that_was_not_given_changes_nothing(load):
    """None among the flags leaves the layer below in force."""
    resolved = load(SBATCH_QOS="q", flags={"request": {"qos": None, "mem": "4G"}})
    assert ("q", "4G") == (resolved.settings.request.qos, resolved.settings.request.mem)


def test_xdg_config_home_replaces_the_home_folder(load, write, tmp_path):
    """The user's file is searched below XDG_CONFIG_HOME where that is set."""
    write("home/.config/hpcresume/config.toml", "[run]\nmax_rounds = 1\n")
    write("xdg/hpcresume/config.toml", "[run]\nmax_rounds = 2\n")
    assert 2 == load(XDG_CONFIG_HOME=str(tmp_path / "xdg")).settings.run.max_rounds


def test_hpcresume_toml_hides_the_pyproject_beside_it(load, write):
    """In one folder hpcresume.toml counts; a pyproject.toml without our table is passed by."""
    write("project/deep/pyproject.toml", "[tool.other]\nx = 1\n")
    write("project/pyproject.toml", "[tool.hpcresume.run]\nmax_rounds = 1\nmax_attempts = 9\n")
    assert 9 == load().settings.run.max_attempts
    write("project/hpcresume.toml", "[run]\nmax_rounds = 2\n")
    run = load().settings.run
    assert (2, 3) == (run.max_rounds, run.max_attempts)


def test_the_highest_layer_replaces_a_list_whole(load, write):
    """Lists are not appended to: what is written is what holds."""
    write("project/hpcresume.toml", "[site]\nnode_local = ['/a']\n")
    assert ["/a"] == load().settings.site.node_local
    assert ["/b"] == load(HPCRESUME_SITE__NODE_LOCAL="/b").settings.site.node_local


def test_unreadable_environment_list_names_the_variable(load):
    """Quotes that do not close are reported with the variable they stand in."""
    with pytest.raises(ConfigError, match="environment HPCRESUME_REQUEST__EXTRA"):
        load(HPCRESUME_REQUEST__EXTRA="'--comment=x")
