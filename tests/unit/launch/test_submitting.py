"""Submitting a round: one pickle, one sbatch, and a script that finds the pickle."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hpcresume.errors import ConfigError, InternalError, SlurmRefusedError
from hpcresume.launch.submitit_executor import submit_merge, submit_round
from tests.unit.launch.jobs import array_job, merge_job, settings
from tests.unit.launch.task_functions import record


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Put an sbatch on the path that notes how it was called and prints what the test says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    calls, answer = tmp_path / "calls", tmp_path / "answer"
    answer.write_text("42\n")
    _command(folder / "sbatch", f'printf "%s\\n" "$*" >> {calls}; cat {answer}')
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return calls, answer


@pytest.fixture
def job(tmp_path):
    """A job array in a run directory of the test's own, with a blank in its name."""
    run = tmp_path / "my run"
    run.mkdir(mode=0o700)
    return array_job(run_dir=run, folder=run / "round", log_dir=run / "logs", tasks=3)


def _command(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def _element(job, tmp_path, *, index: int = 1, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a submitted script as Slurm would run one element, with an srun that only execs.

    What the script would sleep is noted in ``slept``, not slept.
    """
    _command(
        tmp_path / "bin" / "srun",
        'while case "$1" in --*) true;; *) false;; esac; do shift; done; exec "$@"',
    )
    _command(tmp_path / "bin" / "sleep", f'echo "$1" >> {tmp_path / "slept"}')
    root = Path(__file__).parents[3]
    return subprocess.run(
        ["bash", str(job.folder / "job.sh")],
        env={
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "PYTHONPATH": str(root),
            "SLURM_JOB_ID": "44",
            "SLURM_ARRAY_JOB_ID": "42",
            "SLURM_ARRAY_TASK_ID": str(index),
            "SBATCH_ACCOUNT": "left over",
        }
        | environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def _resolved(**flags):
    return settings({"site": {"python": sys.executable}} | flags)


def test_a_round_is_one_pickle_and_one_sbatch(sbatch, job):
    """However many tasks there are, one pickle is written before the one call of sbatch."""
    calls, _ = sbatch
    assert "42" == submit_round(job, _resolved(), function=record, argument="x")
    assert [f"--parsable {job.folder / 'job.sh'}"] == calls.read_text().splitlines()
    assert ["job.sh", "round.pkl"] == sorted(path.name for path in job.folder.iterdir())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in job.folder.iterdir()}
    assert {0o600} == modes
    assert 0o700 == stat.S_IMODE(job.folder.stat().st_mode)
    assert job.log_dir.is_dir()


def test_the_pickle_holds_a_name_and_an_argument(sbatch, job):
    """No code and no state: what runs is what is installed on the node."""
    submit_round(job, _resolved(), function=record, argument="the argument")
    data = (job.folder / "round.pkl").read_bytes()
    assert b"the argument" in data
    assert b"record" in data
    assert len(data) < 1000


def test_a_function_that_would_travel_as_code_is_refused(sbatch, job):
    """Lambdas and local functions have no name to import."""
    with pytest.raises(InternalError, match="not a function of a module"):
        submit_round(job, _resolved(), function=lambda text: text, argument="x")
    assert not job.folder.exists()


@pytest.mark.parametrize("answer", ["42\n", "job 12 of you waits\n42\n", "42;cluster\n"])
def test_the_id_is_the_last_line(sbatch, job, answer):
    """Submit filters print before the id, federations a cluster's name after it."""
    sbatch[1].write_text(answer)
    assert "42" == submit_round(job, _resolved(), function=record, argument="x")


def test_an_answer_without_an_id_is_an_error(sbatch, job):
    """Nothing is guessed from other text."""
    sbatch[1].write_text("Submitted, thanks\n")
    with pytest.raises(SlurmRefusedError, match="Submitted, thanks"):
        submit_round(job, _resolved(), function=record, argument="x")


def test_what_cannot_be_rendered_is_not_submitted(sbatch, job):
    """A setting that is wrong leaves no pickle and calls no sbatch."""
    with pytest.raises(ConfigError):
        submit_round(
            job, _resolved(request={"extra": ["--array=1"]}), function=record, argument="x"
        )
    assert (False, False) == (job.folder.exists(), sbatch[0].exists())


def test_an_element_runs_the_function_through_submitit(sbatch, job, tmp_path):
    """The script copies the pickle to its element's name, and submitit runs it from there."""
    out = tmp_path / "out"
    submit_round(job, _resolved(), function=record, argument=str(out))
    done = _element(job, tmp_path)
    assert 0 == done.returncode, done.stderr
    assert ["task=1 executor=slurm account=None umask=77"] == out.read_text().splitlines()
    assert (job.folder / "42_1_submitted.pkl").read_bytes() == (
        job.folder / "round.pkl"
    ).read_bytes()
    assert [] == [path for path in job.folder.iterdir() if path.name.startswith(".copy")]


def test_an_element_that_is_requeued_uses_its_copy_again(sbatch, job, tmp_path):
    """A second attempt runs; a copy that a crash cut short is replaced."""
    out = tmp_path / "out"
    submit_round(job, _resolved(), function=record, argument=str(out))
    copy = job.folder / "42_1_submitted.pkl"
    assert 0 == _element(job, tmp_path).returncode
    first = copy.stat().st_ino
    assert 0 == _element(job, tmp_path).returncode
    assert first == copy.stat().st_ino
    copy.write_bytes(b"cut")
    assert 0 == _element(job, tmp_path).returncode
    assert 3 == len(out.read_text().splitlines())


def test_the_exit_code_of_the_task_is_that_of_the_script(sbatch, job, tmp_path):
    """Nothing after srun turns a failure into success."""
    submit_round(job, _resolved(), function=record, argument="exit 85")
    assert 85 == _element(job, tmp_path).returncode


@pytest.mark.parametrize("what", ["folder", "round.pkl", "42_1_submitted.pkl"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_a_pickle_that_others_could_write_is_not_loaded(sbatch, job, tmp_path, what, mode):
    """The script stops before Python reads what another user may have put there."""
    out = tmp_path / "out"
    submit_round(job, _resolved(), function=record, argument=str(out))
    path = job.folder if what == "folder" else job.folder / what
    if not path.exists():
        path.write_bytes((job.folder / "round.pkl").read_bytes())
    path.chmod(mode)
    done = _element(job, tmp_path)
    assert (16, False) == (done.returncode, out.exists())
    assert f"{path} can be written by other users" in done.stderr


@pytest.mark.parametrize(("status", "held"), [(0, 0), (85, 0), (76, 0), (1, 1), (143, 1)])
def test_what_cannot_start_holds_its_node(sbatch, job, tmp_path, status, held):
    """
    A task that has said how it ended leaves at once; one that never got so far holds its node
    for the back-off, or the node would be given the next element.
    """
    submit_round(job, _resolved(), function=record, argument=f"exit {status}")
    assert status == _element(job, tmp_path).returncode
    slept = tmp_path / "slept"
    seconds = [int(line) for line in slept.read_text().split()] if slept.exists() else []
    assert held == len(seconds)
    assert all(0 < second <= 30 for second in seconds)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_pickle_of_another_user_is_not_loaded(sbatch, job, tmp_path):
    """The owner counts as well as the mode."""
    submit_round(job, _resolved(), function=record, argument=str(tmp_path / "out"))
    os.chown(job.folder / "round.pkl", 12345, -1)
    done = _element(job, tmp_path)
    assert 16 == done.returncode
    assert "is owned by user 12345" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives directories away")
@pytest.mark.parametrize(
    ("owner", "group", "mode", "status"),
    [
        (0, 0, 0o755, 0),
        (0, 0, 0o775, 0),
        (0, 12345, 0o1777, 0),
        (0, 12345, 0o775, 16),
        (0, 0, 0o757, 16),
        (12345, 12345, 0o755, 16),
    ],
    ids=["closed", "private-group", "sticky", "group", "world", "owner"],
)
def test_a_run_directory_that_others_could_exchange_is_not_used(
    sbatch, job, tmp_path, *, owner, group, mode, status
):
    """Who can write the directory above it could put another one in its place."""
    out = tmp_path / "out"
    submit_round(job, _resolved(), function=record, argument=str(out))
    above = job.run_dir.parent
    above.chmod(mode)
    os.chown(above, owner, group)
    done = _element(job, tmp_path)
    os.chown(above, 0, 0)
    assert (status, status == 0) == (done.returncode, out.exists())
    assert status == 0 or f"{above}, which holds {job.run_dir}, " in done.stderr


def test_a_signal_to_the_batch_shell_does_not_cut_the_task_off(sbatch, job, tmp_path):
    """Slurm's last SIGTERM reaches the shell too; it waits for srun all the same."""
    submit_round(job, _resolved(), function=record, argument="signal parent")
    assert 7 == _element(job, tmp_path).returncode


def test_a_merge_job_is_submitted(sbatch, job):
    """The script is where the caller wants it, and the id is what sbatch said."""
    merge = merge_job(run_dir=job.run_dir, log_dir=job.log_dir)
    script = job.run_dir / "merge.sh"
    assert "42" == submit_merge(merge, _resolved(), script=script)
    assert f"--parsable {script}" == sbatch[0].read_text().strip()
    assert "#SBATCH --dependency=afterany:12\n" in script.read_text()
