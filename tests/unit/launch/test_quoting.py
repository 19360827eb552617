"""No value breaks out of its line, whatever is in it."""

from __future__ import annotations

import os
import shutil
import string
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hpcresume.errors import ConfigError
from hpcresume.launch.rendering import render_array, render_merge
from tests.unit.launch.jobs import array_job, bash_syntax, merge_job, sbatch_reads, settings

_NASTY = "'\"$`;&|<>(){}[]*?!#~= \\%"
values = st.text(
    st.one_of(
        st.sampled_from(_NASTY),
        st.sampled_from(string.ascii_letters + string.digits),
        st.characters(min_codepoint=0xA0, exclude_categories=("Cs", "Cc")),
    ),
    min_size=1,
    max_size=30,
)
# Slurm replaces what follows a percent sign in a path, and a slash ends a name.
names = values.filter(lambda text: not set(text) & set("/%\\") and text not in {".", ".."})


def _lines(script: str) -> int:
    return sum(line.startswith("#SBATCH") for line in script.split("\n"))


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=values, account=values, comment=values, folder=names, variable=values)
def test_no_value_leaves_its_line(name, account, comment, folder, variable):
    """Any path, job name, account or option comes back from the script as it went in."""
    resolved = settings({"request": {"account": account, "extra": [f"--comment={comment}"]}})
    root = Path("/s") / folder
    job = array_job(
        name=name,
        run_dir=root,
        folder=root / "rounds",
        log_dir=root / "logs",
        environment={"HPCRESUME_X": variable},
    )
    text = render_array(job, resolved)
    options = dict(sbatch_reads(text))
    assert [name, account, comment, f"{root}/logs/%A_%a.out"] == [
        options[key] for key in ("job-name", "account", "comment", "output")
    ]
    assert len(options) == len(sbatch_reads(text)) == _lines(text)
    assert "" == bash_syntax(text)
    _shell_sees(text, {"run": str(root), "folder": f"{root}/rounds", "HPCRESUME_X": variable})


def _shell_sees(text: str, expected: dict[str, str]) -> None:
    """Run the script's assignments of ``expected`` and compare what bash makes of them."""
    starts = tuple(f"{prefix}{name}=" for name in expected for prefix in ("", "export "))
    lines = [line for line in text.split("\n") if line.startswith(starts)]
    show = "".join(f"printf '%s\\0' \"${name}\"\n" for name in expected)
    done = subprocess.run(
        ["bash", "-s"],
        input=os.fsencode("\n".join([*lines, show])),
        capture_output=True,
        check=True,
        env={},
    )
    assert list(expected.values()) == os.fsdecode(done.stdout).split("\0")[:-1]


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\t"])
def test_control_characters_in_a_job_are_refused(character):
    """Names and paths come from the pipeline, so they are checked here too."""
    bad = f"a{character}#SBATCH --wrap=x"
    for job in (
        array_job(name=bad),
        array_job(run_dir=Path("/s", bad)),
        array_job(chdir=bad),
        array_job(environment={"X": bad}),
    ):
        with pytest.raises(ConfigError, match="control character"):
            render_array(job, settings())
    for merge in (merge_job(name=bad), merge_job(log_dir=Path("/s", bad))):
        with pytest.raises(ConfigError, match="control character"):
            render_merge(merge, settings())


@pytest.mark.skipif(not shutil.which("sbatch"), reason="sbatch is not installed")
def test_the_real_sbatch_reads_what_was_meant(tmp_path):
    """sbatch itself, before it finds no controller, prints the values that went in."""
    meant = {
        "account": "a 'b' \"c\" \\d\\",
        "job-name": "it's $HOME `x` # ; &&",
        "output": "/s/a 'b' \"c\" $d #/%A_%a.out",
        "comment": "x",
    }
    job = array_job(name=meant["job-name"], log_dir=Path(meant["output"]).parent)
    resolved = settings({"request": {"account": meant["account"], "extra": ["--comment=x"]}})
    script = tmp_path / "job.sh"
    script.write_text(render_array(job, resolved))
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=none\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\n"
        "AuthType=auth/none\nMessageTimeout=1\nNodeName=n1\nPartitionName=p Nodes=n1\n"
    )
    done = subprocess.run(
        ["sbatch", "-vv", str(script)],
        env={"PATH": os.environ["PATH"], "SLURM_CONF": str(conf)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    read = {}
    for line in done.stderr.splitlines():
        name, colon, value = line.removeprefix("sbatch: ").partition(" : ")
        if colon:
            read[name.strip()] = value
    assert meant == {name: read[name] for name in meant}
    assert "sbatch: error: Batch job submission failed" in done.stderr
