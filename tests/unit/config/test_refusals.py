"""What settings are refused, and what the message says about it."""

from __future__ import annotations

import os

import pytest

from hpcresume.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sync]\nmax_age = 5\n", r"unknown key sync\.max_age\..*'max_age_s'"),
        ("[snyc]\nmax_age_s = 5\n", r"unknown section \[snyc\].*'sync'"),
        ("acount = 'x'\n", r"unknown section \[acount\]"),
        ("run = 3\n", r"run = 3 .*expected a table"),
        ("[sync]\nmax_age_s = 'soon'\n", r"sync\.max_age_s = 'soon'.*expected seconds"),
        ("[sync]\nmax_age_s = 0\n", r"sync\.max_age_s = 0 .*more than 0"),
        ("[run]\nmax_attempts = 0\n", r"run\.max_attempts = 0 .*from 1"),
        ("[run]\nmax_attempts = 2.5\n", r"run\.max_attempts = 2\.5 .*an integer"),
        ("[task]\nengine = 'rai'\n", r"task\.engine = 'rai'.*'ray', 'inline'"),
        ("[request]\ntime = '1h'\n", r"request\.time = '1h'.*as sbatch spells it"),
        ("[request]\nmem = '4 GB'\n", r"request\.mem = '4 GB'.*as sbatch spells it"),
        ("[request]\nextra = ['-x']\n", r"request\.extra = \['-x'\].*long spelling"),
        ("[request]\naccount = 5\n", r"request\.account = 5 .*got `int`"),
        ("[request\n", r"is not TOML"),
    ],
)
def test_a_wrong_file_is_named_with_the_key(load, write, text, message):
    """Key, value, what was expected, and the file: everything needed to correct it."""
    path = write("project/hpcresume.toml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load()
    assert str(path) in str(caught.value)
    assert 15 == caught.value.exit_code


def test_a_wrong_variable_is_named(load):
    """A misspelled variable is an error too, with the nearest key."""
    with pytest.raises(ConfigError, match=r"HPCRESUME_SYNC__MAX_AGES.*'max_age_s'"):
        load(HPCRESUME_SYNC__MAX_AGES="5")


def test_other_variables_of_ours_are_no_settings(load):
    """Variables with one underscore in the middle are not settings and pass."""
    assert "default" == load(HPCRESUME_TEST_TIER="all").origins["run.max_rounds"]


def test_a_wrong_flag_names_the_command_line(load):
    """What the command line gave is named as such."""
    with pytest.raises(ConfigError, match=r"request\.time = 'x' \(command line\)"):
        load(flags={"request": {"time": "x"}})


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\x1b", "\x7f"])
@pytest.mark.parametrize(
    "flags",
    [
        {"request": {"account": "a{}b"}},
        {"site": {"setup": ["module load x{}rm -rf"]}},
        {"request": {"extra": ["--comment=a{}b"]}},
    ],
)
def test_control_characters_are_refused(load, character, flags):
    """A newline in a value would start another line of the script."""
    filled = {
        section: {
            key: [v.format(character) for v in value]
            if isinstance(value, list)
            else value.format(character)
            for key, value in entries.items()
        }
        for section, entries in flags.items()
    }
    with pytest.raises(ConfigError, match="control character"):
        load(flags=filled)


def test_a_newline_in_a_site_file_is_refused(load, write):
    """TOML's multi-line strings do not smuggle lines in either."""
    path = write("sites/mine/site.toml", '[site]\nsetup = ["""a\nb"""]\n')
    with pytest.raises(ConfigError, match="control character") as caught:
        load(site="mine")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_site_file_that_others_can_write_is_refused(load, write, mode):
    """Its setup lines would run as us in every job."""
    path = write("sites/mine/site.toml", "[run]\nmax_rounds = 1\n")
    assert 1 == load(site="mine").settings.run.max_rounds
    path.chmod(mode)
    with pytest.raises(ConfigError, match="can be written by other users") as caught:
        load(site="mine")
    assert f"chmod go-w {path}" in str(caught.value)


def test_a_site_folder_that_others_can_write_is_refused(load, write):
    """Whoever can write the folder can put another file in its place."""
    path = write("sites/mine/site.toml", "[run]\nmax_rounds = 1\n")
    path.parent.chmod(0o775)
    with pytest.raises(ConfigError, match=f"chmod go-w {path.parent}"):
        load(site="mine")


def test_the_user_file_that_others_can_write_is_refused(load, write):
    """The same holds for the user's own file."""
    write("home/.config/hpcresume/config.toml", "[run]\nmax_rounds = 1\n").chmod(0o664)
    with pytest.raises(ConfigError, match="can be written by other users"):
        load()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_site_file_of_another_user_is_refused(load, write):
    """A file owned by neither us nor root is another user's to change."""
    path = write("sites/mine/site.toml", "[run]\nmax_rounds = 1\n")
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="owned by user 12345"):
        load(site="mine")


def test_a_group_project_may_set_values_but_no_shell_lines(load, write):
    """A project file that the group writes sets an account, but runs nothing as us."""
    path = write("project/hpcresume.toml", "[request]\naccount = 'shared'\n")
    path.chmod(0o664)
    assert "shared" == load().settings.request.account
    write("project/hpcresume.toml", "[site]\nsetup = ['echo hello']\n")
    assert ["echo hello"] == load().settings.site.setup
    path.chmod(0o664)
    with pytest.raises(ConfigError, match=r"sets site\.setup"):
        load()


def test_an_unreadable_file_is_named(load, write, tmp_path):
    """A file that is no text is an error, not a silent default."""
    path = write("project/hpcresume.toml", "")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not TOML"):
        load()
