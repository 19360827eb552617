"""Slurm's answers as typed values, and its three kinds of failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcresume import slurm
from hpcresume.errors import SlurmMissingError, SlurmRefusedError, SlurmUnreachableError

# `scontrol show job -o` of Slurm 22.05.8, with SLURM_TIME_FORMAT=%s.
RECORD = (
    "JobId=2 ArrayJobId=1 ArrayTaskId=0 JobName=j.sh UserId=root(0) GroupId=root(0) MCS_label=N/A "
    "Priority=4294901759 Nice=0 Account=root QOS=normal JobState=RUNNING Reason=None "
    "Dependency=(null) Requeue=1 Restarts=3 BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=1-00:00:03 "
    "TimeLimit=01:00:00 TimeMin=N/A SubmitTime=1795234970 EligibleTime=1795234970 "
    "AccrueTime=Unknown StartTime=1795234970 EndTime=1795238570 Deadline=N/A "
    "PreemptEligibleTime=1795234970 PreemptTime=None SuspendTime=None SecsPreSuspend=0 "
    "Partition=low AllocNode:Sid=localhost:3184 ReqNodeList=(null) ExcNodeList=(null) "
    "NodeList=n1 BatchHost=n1 NumNodes=1 NumCPUs=2 CPUs/Task=2 ReqB:S:C:T=0:0:*:* "
    "TRES=cpu=2,mem=5422M,node=1,billing=2 Command=/tmp/j.sh WorkDir=/tmp StdErr=/tmp/o-0 Power= "
)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that puts a shell script of a given name first on the path."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, body: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    return make


def test_fields_of_a_record_are_read_by_name() -> None:
    """One record gives typed fields; times are unix seconds, durations seconds."""
    (info,) = slurm.parse_jobs(RECORD + "\n")

    assert (
        slurm.JobInfo(
            job_id=slurm.JobId("1_0"),
            state="RUNNING",
            name="j.sh",
            array_job_id="1",
            array_task="0",
            reason=None,
            restarts=3,
            end_time=1795238570.0,
            start_time=1795234970.0,
            preempt_time=None,
            run_time_s=86403.0,
            time_limit_s=3600.0,
            node_list="n1",
            exit_code="0:0",
        )
        == info
    )


def test_the_steps_exit_code_is_asked_for(tool) -> None:
    """Of a step that ended for want of memory the job's own exit code does not tell."""
    record = "JobId=3 JobName=a JobState=FAILED ExitCode=1:0 DerivedExitCode=0:125"
    tool("scontrol", f'case "$*" in *" -d "*) echo "{record}";; *) echo "JobId=3";; esac')

    assert ["0:125"] == [info.step_exit_code for info in slurm.show_job("3", details=True)]
    assert [None] == [info.step_exit_code for info in slurm.show_job("3")]


def test_job_name_cannot_pose_as_fields() -> None:
    """A job's name that looks like fields changes none of them."""
    name = "x JobState=COMPLETED Restarts=9 y"

    (info,) = slurm.parse_jobs(RECORD.replace("j.sh User", f"{name} User"))

    assert (name, "RUNNING", 3) == (info.name, info.state, info.restarts)


def test_missing_fields_are_none() -> None:
    """A record of a version that lacks a field gives None for it."""
    (info,) = slurm.parse_jobs("JobId=7 JobName=a UserId=u(1) GroupId=g(1) JobState=PENDING")

    assert (None, None, None) == (info.restarts, info.end_time, info.array_job_id)
    assert ("7", "PENDING") == (info.job_id, info.state)


def test_an_unsplit_array_keeps_its_task_list() -> None:
    """The pending rest of an array is one record; its id is the array's."""
    text = RECORD.replace("JobId=2", "JobId=1").replace("ArrayTaskId=0", "ArrayTaskId=3-7%2")

    (info,) = slurm.parse_jobs(text)

    assert ("1", "3-7%2") == (info.job_id, info.array_task)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:30", 30.0),
        ("01:02:03", 3723.0),
        ("2-00:00:01", 172801.0),
        ("UNLIMITED", None),
        ("Partition_Limit", None),
        (None, None),
    ],
)
def test_durations(text: str | None, seconds: float | None) -> None:
    """Slurm's durations are seconds; no limit is None."""
    assert seconds == slurm.parse_duration(text)


def test_times_are_also_read_in_iso_form() -> None:
    """A wrapper that drops SLURM_TIME_FORMAT still gives the same moment."""
    assert slurm.parse_time("1795238570") is not None
    local = "2026-11-21T05:22:50"
    assert 0 == (slurm.parse_time(local) or 0) % 10
    assert slurm.parse_time("Unknown") is None
    assert slurm.parse_time("soon") is None


@pytest.mark.parametrize("text", ["12\n", "12;cluster\n", "a site's greeting\n12;c\n"])
def test_job_id_is_the_last_line(text: str) -> None:
    """`--parsable` output is read past a wrapper's chatter and a cluster's name."""
    assert "12" == slurm.parse_sbatch(text)


@pytest.mark.parametrize("text", ["", "Submitted batch job 12\n", ";c\n"])
def test_output_without_a_job_id_is_refused(text: str) -> None:
    """What names no job is an error that shows it, never a wrong id."""
    with pytest.raises(SlurmRefusedError, match="named no job"):
        slurm.parse_sbatch(text)


def test_environment_keeps_only_the_cluster_of_slurms_variables() -> None:
    """Variables that would override options are dropped; SLURM_CONF and the rest stay."""
    base = {
        "SBATCH_PARTITION": "x",
        "SQUEUE_FORMAT": "x",
        "SCANCEL_STATE": "x",
        "SALLOC_ACCOUNT": "x",
        "SACCT_FORMAT": "x",
        "SLURM_JOB_ID": "7",
        "SLURM_MEM_PER_CPU": "1",
        "SLURM_CONF": "/etc/x.conf",
        "HOME": "/home/u",
    }

    expected = {"SLURM_CONF": "/etc/x.conf", "HOME": "/home/u", "SLURM_TIME_FORMAT": "%s"}
    assert expected == slurm.command_environment(base)


def test_commands_run_in_the_scrubbed_environment(tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sbatch sees neither the surrounding job's variables nor SBATCH_*."""
    monkeypatch.setenv("SBATCH_ACCOUNT", "other")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    tool("sbatch", '[ -z "$SBATCH_ACCOUNT$SLURM_JOB_ID" ] && echo 5')

    assert "5" == slurm.sbatch(["-a", "0-3"], script=Path("x.sh"))


def test_absent_command_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Slurm's commands the error names the one and the way out."""
    monkeypatch.setenv("PATH", str(tmp_path))

    assert not slurm.available()
    with pytest.raises(SlurmMissingError, match="--cluster local"):
        slurm.show_job("1")


def test_a_conf_that_does_not_exist_is_missing(tool, tmp_path: Path) -> None:
    """A wrong SLURM_CONF is said at once; the commands would look for it for a minute."""
    tool("squeue", "exit 0")

    with pytest.raises(SlurmMissingError, match="no such file"):
        slurm.queue(conf=tmp_path / "slurm.conf")


def test_no_configuration_is_missing(tool) -> None:
    """Commands that are installed but know no cluster say what to set."""
    tool("squeue", "echo 'squeue: fatal: Could not establish a configuration source' >&2; exit 1")

    with pytest.raises(SlurmMissingError, match="SLURM_CONF"):
        slurm.queue()


@pytest.mark.parametrize(
    "complaint",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "Zero Bytes were transmitted or received",
    ],
)
def test_no_answer_is_unreachable(tool, complaint: str) -> None:
    """What a silent controller makes the commands say warns of a late effect."""
    tool("sbatch", f"echo '{complaint}' >&2; exit 1")

    with pytest.raises(SlurmUnreachableError, match="may still take effect later"):
        slurm.sbatch([], script=Path("x.sh"))


def test_time_limit_of_a_call_is_kept(tool) -> None:
    """A command that hangs is ended at its time limit."""
    tool("scontrol", "exec sleep 60")

    with pytest.raises(SlurmUnreachableError, match=r"no answer within 0\.2 s"):
        slurm.requeue("1_2", timeout_s=0.2)


def test_refusal_carries_slurms_words(tool) -> None:
    """A refusal shows Slurm's own message and keeps it as a field."""
    tool("sbatch", "echo 'sbatch: error: Invalid job array specification' >&2; exit 1")

    with pytest.raises(SlurmRefusedError, match="Invalid job array specification") as caught:
        slurm.sbatch(["-a", "0-9999"], script=Path("x.sh"))

    assert "sbatch: error: Invalid job array specification" == caught.value.fields["stderr"]


def test_requeue_of_a_pending_job_counts_as_done(tool) -> None:
    """Slurm's complaint that the job is pending already is success."""
    tool("scontrol", "echo 'Job is pending execution for job 1_2' >&2; exit 1")
    slurm.requeue("1_2")

    tool("scontrol", "echo 'Requested operation is presently disabled for job 1_2' >&2; exit 1")
    with pytest.raises(SlurmRefusedError, match="presently disabled"):
        slurm.requeue("1_2")


def test_cancel_fails_only_for_what_is_not_over(tool) -> None:
    """Ended jobs are no reason to fail; a job that may not be touched is."""
    over = "scancel: error: Kill job error on job id 5: Invalid job id specified"
    denied = "scancel: error: Kill job error on job id 6: Access/permission denied"
    tool("scancel", f"echo '{over}' >&2; exit 1")
    slurm.cancel(["5"])

    tool("scancel", f"echo '{over}' >&2; echo '{denied}' >&2; exit 1")
    with pytest.raises(SlurmRefusedError, match="permission denied"):
        slurm.cancel(["5", "6"])


def test_cancel_of_nothing_asks_nothing(tool) -> None:
    """An empty list runs no scancel, which would read its filters instead."""
    tool("scancel", "exit 1")

    slurm.cancel([])


def test_queue_reads_elements_and_names_with_separators(tool) -> None:
    """Each element is an entry; the name may hold the separator."""
    running = "9_4|9|4|RUNNING|n3|None|(null)|a|b"
    pending = "7|7|N/A|PENDING||Dependency|afterany:9_*(unfulfilled)|c"
    tool("squeue", f"echo '{running}'; echo '{pending}'")
    after = "afterany:9_*(unfulfilled)"

    assert [
        slurm.QueueEntry(slurm.JobId("9_4"), "9", 4, "a|b", "RUNNING", None, "n3"),
        slurm.QueueEntry(slurm.JobId("7"), "7", None, "c", "PENDING", "Dependency", None, after),
    ] == slurm.queue(["9", "7"])


@pytest.mark.parametrize(
    ("dependency", "waits"),
    [
        ("afternotok:12(unfulfilled)", True),
        ("afterany:7_*(unfulfilled),afterany:12_*(unfulfilled)", True),
        ("afternotok:112(unfulfilled)", False),
        ("afternotok:123(unfulfilled)", False),
        (None, False),
    ],
)
def test_what_a_job_waits_for(dependency: str | None, waits: bool) -> None:
    """The id of a job counts as a whole, not as a part of another's."""
    entry = slurm.QueueEntry(
        slurm.JobId("13"), "13", None, "twin", "PENDING", "Dependency", None, dependency
    )

    assert waits == entry.waits_for("12")


def test_queue_asks_for_all_states_once(tool, tmp_path: Path) -> None:
    """One squeue for several jobs, ended ones included; by name it asks for one user's."""
    tool("squeue", f'echo "$@" >> {tmp_path}/asked')

    slurm.queue(["1", "2"])
    slurm.queue(name="run", user=1000)

    by_id, by_name = (tmp_path / "asked").read_text().splitlines()
    assert "-r -t all" in by_id
    assert by_id.endswith("-j 1,2")
    assert by_name.endswith("-u 1000 --name run")


def test_accounting_gives_every_run_and_a_typed_answer_where_there_is_none(tool) -> None:
    """A requeued element has one entry a run; without slurmdbd a type of its own says so."""
    tool("sacct", "echo '1_0|COMPLETED|0:0|7|9'; echo '1_0|CANCELLED by 0|0:15|3|5'")
    seen = [(e.state, e.restarts, e.end_time) for e in slurm.accounting("1")]
    assert [("CANCELLED", 0, 5.0), ("COMPLETED", 1, 9.0)] == seen

    tool("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    with pytest.raises(slurm.AccountingUnavailableError):
        slurm.accounting("1")


def test_config_and_nodes_are_dictionaries_of_the_live_settings(tool) -> None:
    """Settings keep Slurm's spelling; a node in two partitions is listed once."""
    tool("scontrol", "echo 'Configuration data as of now'; echo 'AuthInfo    = a=b,c=5'")
    tool("sinfo", "echo 'n1|idle'; echo 'n1|idle'; echo 'n2|down*'")

    assert {"AuthInfo": "a=b,c=5"} == slurm.config()
    assert [slurm.NodeEntry("n1", "idle"), slurm.NodeEntry("n2", "down*")] == slurm.nodes()


# `scontrol show partition -o` of Slurm 22.05.8.
PARTITIONS = (
    "PartitionName=low AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES "
    "QoS=N/A DefaultTime=01:00:00 DisableRootJobs=NO ExclusiveUser=NO GraceTime=15 Hidden=NO "
    "MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 LLN=YES MaxCPUsPerNode=UNLIMITED "
    "Nodes=n[1-4] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO "
    "OverTimeLimit=NONE PreemptMode=REQUEUE State=UP TotalCPUs=8 TotalNodes=4 "
    "SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED "
    "MaxMemPerNode=UNLIMITED TRES=cpu=8,mem=21692M,node=4,billing=8\n"
    "PartitionName=night AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=login[1-2] "
    "Default=NO QoS=small DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 "
    "Hidden=NO MaxNodes=UNLIMITED MaxTime=1-00:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED "
    "Nodes=n[1-4] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO "
    "OverSubscribe=EXCLUSIVE OverTimeLimit=NONE PreemptMode=OFF State=DRAIN TotalCPUs=8 "
    "TotalNodes=4 SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED "
    "MaxMemPerNode=UNLIMITED\n"
)
NO_DATABASE = "sacctmgr: error: Sending PersistInit msg: Connection refused\nproblem with slurmdbd"


def test_partitions_are_read_by_name(tool) -> None:
    """Limits, preemption and who may submit come from the one-line records."""
    tool("scontrol", f"cat <<'E'\n{PARTITIONS}E")

    assert [
        slurm.Partition(
            name="low",
            default=True,
            state="UP",
            max_time="UNLIMITED",
            default_time="01:00:00",
            preempt_mode="REQUEUE",
            grace_s=15,
            qos=None,
            exclusive=False,
            submitters="ALL",
        ),
        slurm.Partition(
            name="night",
            default=False,
            state="DRAIN",
            max_time="1-00:00:00",
            default_time=None,
            preempt_mode="OFF",
            grace_s=0,
            qos="small",
            exclusive=True,
            submitters="login[1-2]",
        ),
    ] == slurm.partitions()


def test_qualities_of_service_have_limits_or_none(tool) -> None:
    """A limit that is not set is None; a grace period is in seconds, however it is spelled."""
    tool("sacctmgr", "printf 'normal||00:00:00\\nsmall|4|00:02:00\\nlong|50|90\\n'")

    assert [
        slurm.Qos("normal", None, None),
        slurm.Qos("small", 4, 120),
        slurm.Qos("long", 50, 90),
    ] == slurm.qualities()


def test_associations_of_a_user(tool, tmp_path: Path) -> None:
    """One for each account and partition; what is not set is None; user and cluster are named."""
    rows = "everyone||normal||\\nphysics|night|normal,small|small|200\\n"
    tool("sacctmgr", f'echo "$*" > {tmp_path}/asked; printf "{rows}"')

    assert [
        slurm.Association("everyone", None, ("normal",), None, None),
        slurm.Association("physics", "night", ("normal", "small"), "small", 200),
    ] == slurm.associations("ann", cluster="big")
    assert "user=ann cluster=big" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize("ask", [slurm.qualities, lambda: slurm.associations("ann", cluster="big")])
def test_a_silent_accounting_is_its_own_error(tool, ask) -> None:
    """A cluster without slurmdbd, or with one that is away, is told from a refusal."""
    tool("sacctmgr", f"echo '{NO_DATABASE}' >&2; exit 1")

    with pytest.raises(slurm.AccountingUnavailableError, match="accounting does not answer"):
        ask()


def test_a_script_that_would_be_taken(tool, tmp_path: Path) -> None:
    """`--test-only` stands before the options and the script; its forecast is no refusal."""
    forecast = "sbatch: Job 9 to start at 2026-11-21T07:30:00 using 2 processors on nodes n1"
    tool("sbatch", f"echo \"$*\" > {tmp_path}/asked; echo '{forecast}' >&2")

    slurm.would_accept(["--mem=1M"], script=Path("/s/job.sh"))

    assert "--test-only --mem=1M /s/job.sh\n" == (tmp_path / "asked").read_text()


def test_a_script_that_would_be_refused(tool) -> None:
    """The reason is kept; a silent controller is not a refusal."""
    tool("sbatch", "echo 'allocation failure: Invalid job array specification' >&2; exit 1")
    with pytest.raises(SlurmRefusedError) as error:
        slurm.would_accept(script=Path("/s/job.sh"))
    assert "Invalid job array specification" in error.value.fields["stderr"]

    tool("sbatch", "echo 'sbatch: error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(SlurmUnreachableError):
        slurm.would_accept(script=Path("/s/job.sh"))


# What scontrol of Slurm 22.05.8 says where some elements of the array run.
PARTLY = "1_0-3: Job is no longer pending execution\n1_4-9: No error"


def test_nodes_are_taken_out_of_pending_elements(tool, tmp_path: Path) -> None:
    """That running elements cannot be changed any more is no failure."""
    tool("scontrol", f"echo \"$*\" > {tmp_path}/asked; echo '{PARTLY}' >&2; exit 1")

    slurm.exclude_nodes("1", "n1,n2")

    assert "update JobId=1 ExcNodeList=n1,n2\n" == (tmp_path / "asked").read_text()


def test_a_refusal_for_a_pending_element_is_one(tool) -> None:
    """Whoever may not change the job is told so."""
    tool("scontrol", "echo '1_4-9: Access/permission denied' >&2; exit 1")
    with pytest.raises(SlurmRefusedError, match="permission denied"):
        slurm.exclude_nodes("1", "n1")


@pytest.mark.parametrize(
    ("state", "ended"),
    [("COMPLETED", True), ("CANCELLED by 0", True), ("COMPLETING", False), ("PENDING", False)],
)
def test_what_slurm_still_cleans_up_has_not_ended(state: str, ended: bool) -> None:
    """A job that is completing still counts against limits."""
    entry = slurm.QueueEntry(slurm.JobId("1"), "1", None, "x", state, None, None)
    assert ended == entry.ended
