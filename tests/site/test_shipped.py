"""The shipped sites: each loads, renders, is recognised alone, and says what it does not know."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest

from hpcresume.config import Resolved, data_dir, find_site, identify_site, site_names
from hpcresume.errors import ConfigError
from hpcresume.launch.rendering import render_array, render_merge
from tests.unit.launch.jobs import array_job, bash_syntax, merge_job, sbatch_reads, settings

NAMES = site_names({})
BASES = {"generic", "tacc", "alps", "alliance"}
"""Sites that no machine is recognised as: others extend them, or a user names them."""

ASKED = {
    "account": "proj",
    "partition": "part",
    "qos": "qos",
    "constraint": "kind",
    "time": "01:00:00",
    "mem": "8G",
    "cpus_per_task": 4,
    "gpus_per_task": 2,
}


def resolved(name: str) -> Resolved:
    """Return a site's settings with everything asked for that some site requires."""
    return settings({"request": ASKED}, site=name)


def environ_of(name: str) -> dict[str, str]:
    """Return an environment that the site's own file says it is recognised by."""
    identify = find_site(name, {}).identify
    found = {key: pattern.replace("*", "") for key, pattern in identify.env.items()}
    return found | {"SLURM_CLUSTER_NAME": identify.cluster_name.replace("*", "") or "elsewhere"}


def test_the_centres_of_the_readme_are_shipped():
    """At least these systems have a site."""
    assert {
        "perlmutter", "frontier", "stampede3", "vista", "juwels", "lumi", "daint", "narval",
        "rorqual", "leonardo", "raven", "marenostrum5", "delta", "testbed", "generic",
    } <= set(NAMES)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_site_renders_both_scripts(name):
    """The array's and the merge job's script of a site are valid bash that asks what is asked."""
    site = resolved(name)
    scripts = [render_array(array_job(), site), render_merge(merge_job(), site)]
    assert ["", ""] == [bash_syntax(script) for script in scripts]
    for script in scripts:
        options = dict(sbatch_reads(script))
        assert set() == set(site.settings.site.forbidden) & set(options)
        assert set(site.settings.site.required) <= set(options)
    assert "proj" == dict(sbatch_reads(scripts[0]))["account"]


@pytest.mark.parametrize("name", NAMES)
def test_a_site_asks_for_what_it_requires(name):
    """Without what the centre requires there is no script, and the message names the options."""
    bare = settings(site=name)
    missing = [
        option
        for option in bare.settings.site.required
        if not getattr(bare.settings.request, option.replace("-", "_"))
    ]
    if not missing:
        assert render_array(array_job(), bare).startswith("#!/bin/bash\n")
        return
    with pytest.raises(ConfigError, match=" and ".join(f"--{option}" for option in missing)):
        render_array(array_job(), bare)


@pytest.mark.parametrize("name", sorted(set(NAMES) - BASES))
def test_a_site_is_recognised_as_itself_alone(name):
    """What one site is recognised by matches no other."""
    assert name == identify_site(environ_of(name))[0]


@pytest.mark.parametrize("name", sorted(BASES))
def test_a_base_is_not_recognised(name):
    """A file that only others extend matches no machine."""
    identify = find_site(name, {}).identify
    assert ({}, "") == (identify.env, identify.cluster_name)


def test_no_two_sites_look_for_the_same():
    """No two patterns of the shipped sites can match one value."""
    seen: list[tuple[str, str, str]] = []
    for name in sorted(set(NAMES) - BASES):
        identify = find_site(name, {}).identify
        for kind, pattern in [*identify.env.items(), ("ClusterName", identify.cluster_name)]:
            if pattern:
                rivals = [
                    other
                    for other, other_kind, other_pattern in seen
                    if kind == other_kind
                    and (fnmatchcase(pattern, other_pattern) or fnmatchcase(other_pattern, pattern))
                ]
                assert [] == rivals
                seen.append((name, kind, pattern))


def comments(text: str) -> Iterator[str]:
    """Yield the comments of a site file, those of neighbouring lines joined."""
    found = [re.search(r"#\s*(.*)", line) for line in text.splitlines()]
    block: list[str] = []
    for match in [*found, None]:
        if match:
            block.append(match[1])
        elif block:
            yield " ".join(block)
            block = []


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"generic", "testbed"}))
def test_a_site_names_its_centres_page(name):
    """Every centre's file names a page of the centre's documentation, for what to verify."""
    text = (data_dir("site") / name / "site.toml").read_text(encoding="utf-8")
    assert any("https://" in comment for comment in comments(text))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_unconfirmed_says_where_to_look(name):
    """A value that nobody has seen to be right has the centre's page beside it."""
    text = (data_dir("site") / name / "site.toml").read_text(encoding="utf-8")
    doubtful = [comment for comment in comments(text) if "unconfirmed" in comment]
    assert [] == [comment for comment in doubtful if "https://" not in comment]


@pytest.mark.parametrize("name", NAMES)
def test_a_site_runs_no_shell_lines_of_its_own(name):
    """Modules and environments are a user's choice; a shipped file decides none of them."""
    data = tomllib.loads((data_dir("site") / name / "site.toml").read_text(encoding="utf-8"))
    assert {} == {k: v for k, v in data.get("site", {}).items() if k in {"setup", "python"}}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("perlmutter", {"qos": "qos", "constraint": "kind", "mem": "8G", "gpus-per-task": "2"}),
        ("stampede3", {"partition": "part", "cpus-per-task": "4"}),
        ("leonardo", {"mem": "8G", "gres": "gpu:2"}),
        ("lumi", {"mem": "8G", "gpus-per-node": "2"}),
        ("frontier", {"gpus-per-node": "2"}),
        ("alps", {"gpus-per-task": "2"}),
    ],
)
def test_a_request_is_spelled_as_the_centre_takes_it(name, expected):
    """Memory and GPUs are asked for in the centre's way, or not at all."""
    options = dict(sbatch_reads(render_array(array_job(), resolved(name))))
    spelled = ("mem", "mem-per-cpu", "gres", "gpus-per-task", "gpus-per-node")
    assert {k: v for k, v in expected.items() if k in spelled} == {
        k: v for k, v in options.items() if k in spelled
    }
    assert expected.items() <= options.items()


def test_a_centre_without_arrays_gets_single_jobs():
    """Where --array is not available, a task is a job that knows its number."""
    site = resolved("frontera")
    assert not site.settings.site.arrays
    script = render_array(array_job(tasks=1, index=3), site)
    assert "array" not in dict(sbatch_reads(script))
    assert "export HPCRESUME_TASK=3" in script
