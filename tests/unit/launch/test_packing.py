"""How many array tasks fit, and what a refusal teaches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcresume.errors import SlurmRefusedError
from hpcresume.launch.packing import capacity, foresee, has_twin, learn, with_live_limits
from tests.unit.launch.jobs import settings

# What sbatch of Slurm 22.05.8 says.
ARRAY = "sbatch: error: Batch job submission failed: Invalid job array specification"
SUBMIT = (
    "sbatch: error: QOSMaxSubmitJobPerUserLimit\n"
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy "
    "(job submit limit, user's size and/or time limits)"
)


def refusal(stderr: str) -> SlurmRefusedError:
    """Return what slurm.sbatch raises."""
    return SlurmRefusedError("Slurm refused `sbatch`", stderr=stderr)


def site(**values: object):
    """Return settings of a site."""
    return settings({"site": values})


@pytest.fixture
def slurm_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put Slurm commands with recorded answers first on the path."""

    def make(*, config: str = "", qos: str = "", queue: str = "") -> None:
        show = f"{config}\nAccountingStorageEnforce = associations,limits\nClusterName = c"
        bodies = {
            "scontrol": f"case \"$*\" in *config) cat <<'E'\n{show}\nE\n;; esac",
            "sacctmgr": f'case "$*" in *qos*) echo "{qos}" ;; *) echo "everyone||normal||" ;; esac'
            if qos
            else 'echo "You are not running a supported accounting_storage plugin" >&2; exit 1',
            "squeue": f"cat <<'E'\n{queue}\nE",
        }
        for name, body in bodies.items():
            path = tmp_path / name
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("SLURM_CONF", raising=False)

    return make


@pytest.mark.parametrize(
    ("values", "tasks", "twin"),
    [
        ({"max_array_size": 8}, 8, True),
        ({"max_array_size": 1000, "max_submit": 100}, 96, True),
        ({"max_submit": 6}, 2, True),
        ({"max_submit": 5}, 3, False),
        ({"max_submit": 3}, 1, False),
        ({"max_submit": 1}, 1, False),
        ({"arrays": False, "max_array_size": 8, "max_submit": 50}, 46, True),
    ],
)
def test_room_is_left_for_merge_jobs(values, tasks, twin) -> None:
    """A round is submitted while the merge job before it still counts; twins count too."""
    found = site(**values).settings.site
    assert (tasks, twin) == (capacity(found), has_twin(found))


def test_the_live_limit_of_arrays_counts() -> None:
    """A smaller MaxArraySize than the site's, or none at all, wins, and is named as the origin."""
    asked = site(max_array_size=1000)
    assert asked is with_live_limits(asked, {})
    assert asked is with_live_limits(asked, {"MaxArraySize": "4000001"})
    found = with_live_limits(asked, {"MaxArraySize": "8"})
    assert 8 == found.settings.site.max_array_size
    assert "scontrol show config" == found.origins["site.max_array_size"]
    found = with_live_limits(
        asked, {"MaxArraySize": "1001", "SchedulerParameters": "x,max_array_tasks=5"}
    )
    assert 5 == found.settings.site.max_array_size
    assert not with_live_limits(asked, {"MaxArraySize": "0"}).settings.site.arrays


def test_an_array_that_is_too_large(slurm_answers) -> None:
    """MaxArraySize is asked for, and is the line to write."""
    slurm_answers(config="MaxArraySize = 8")
    learned = learn(refusal(ARRAY), site(), tasks=64)
    assert (8, 8) == (learned.most, learned.resolved.settings.site.max_array_size)
    assert "site.max_array_size = 8" in learned.note


def test_a_cluster_without_arrays(slurm_answers) -> None:
    """Single jobs are submitted instead, as many as there were tasks."""
    slurm_answers(config="MaxArraySize = 0")
    learned = learn(refusal(ARRAY), site(), tasks=64)
    assert (64, False) == (learned.most, learned.resolved.settings.site.arrays)


def test_a_submit_limit(slurm_answers) -> None:
    """The limit of the QOS is what the site file is to say; now, queued jobs count as well."""
    queue = "9|9|N/A|RUNNING|n1|None||merge\n8|8|N/A|COMPLETED|n1|None||old"
    slurm_answers(qos="normal|20|00:00:00", queue=queue)
    learned = learn(refusal(SUBMIT), site(), tasks=64)
    assert (16, 20) == (learned.most, learned.resolved.settings.site.max_submit)
    assert "QOS normal takes 20 jobs, 1 are queued: site.max_submit = 20" == learned.note
    assert "QOS normal" == learned.resolved.origins["site.max_submit"]


def test_a_limit_that_slurm_does_not_tell(slurm_answers) -> None:
    """Half as many are tried, down to one; then the refusal stands, with what to do."""
    slurm_answers()
    tried = [64]
    while tried[-1] > 1:
        tried.append(learn(refusal(SUBMIT), site(), tasks=tried[-1]).most)
    assert [64, 32, 16, 8, 4, 2, 1] == tried
    with pytest.raises(SlurmRefusedError, match="hpcresume drive"):
        learn(refusal(SUBMIT), site(), tasks=1)


def test_a_limit_that_is_not_the_one_enforced(slurm_answers) -> None:
    """Where Slurm says that more would fit than it has refused, half is tried."""
    slurm_answers(qos="normal|5000|00:00:00")
    assert 32 == learn(refusal(SUBMIT), site(), tasks=64).most


def test_other_refusals_stand(slurm_answers) -> None:
    """Nothing is learned from a wrong partition."""
    wrong = refusal("sbatch: error: invalid partition specified: nowhere")
    with pytest.raises(SlurmRefusedError) as error:
        learn(wrong, site(), tasks=64)
    assert wrong is error.value


def test_single_jobs_are_counted_before_any_is_submitted(slurm_answers) -> None:
    """Of single jobs Slurm would take some before it refused one."""
    slurm_answers(qos="normal|4|00:00:00")
    learned = foresee(site(arrays=False), tasks=64)
    assert learned is not None
    assert 2 == learned.most
    assert foresee(site(arrays=False), tasks=2) is None
    assert foresee(site(arrays=False, max_submit=100), tasks=64) is None
    assert foresee(site(), tasks=64) is None
