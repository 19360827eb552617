"""What a testbed needs on the machine, and how it gets there."""

from __future__ import annotations

import os
import shutil
import subprocess

from hpcresume.errors import TestbedError

_PACKAGES = ["slurm-wlm", "slurm-wlm-basic-plugins", "munge"]
_ACCOUNTING_PACKAGES = ["slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server"]
_BASIC = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "munged", "unshare")
_ACCOUNTING = ("slurmdbd", "sacctmgr", "sacct", "mariadbd", "mariadb-install-db")
# Daemons live where an ordinary user's PATH does not look.
SEARCH_PATH = os.pathsep.join(
    [os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"]
)


def missing(*, accounting: bool) -> list[str]:
    """Return the commands a testbed needs that are not on this machine."""
    needed = _BASIC + (_ACCOUNTING if accounting else ())
    return [name for name in needed if shutil.which(name, path=SEARCH_PATH) is None]


def install_line(*, accounting: bool) -> list[str]:
    """Return the apt command that installs what a testbed needs."""
    names = _PACKAGES + (_ACCOUNTING_PACKAGES if accounting else [])
    return ["apt-get", "install", "-y", "--no-install-recommends", *names]


def require(*, accounting: bool) -> None:
    """Raise unless a testbed can be brought up here.

    Raises:
        TestbedError: Not root, or commands are missing; with what to do.
    """
    absent = missing(accounting=accounting)
    if absent:
        raise TestbedError(
            f"not installed here: {', '.join(absent)}. A testbed is made of Slurm's own daemons. "
            f"As root: {' '.join(install_line(accounting=accounting))} "
            "(or: hpcresume testbed up --install)",
            missing=absent,
        )
    if os.geteuid() != 0:
        raise TestbedError(
            "a testbed needs root: Slurm's daemons start jobs as their users, and each node has "
            "its own mounts. Run it with sudo; jobs may then be submitted by any user"
        )


def install(*, accounting: bool) -> None:
    """Install what is missing with apt; does nothing where all is there.

    Raises:
        TestbedError: No apt here, not root, or apt failed.
    """
    if not missing(accounting=accounting):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise TestbedError(
            "cannot install Slurm's packages: that takes root and apt-get (Debian, Ubuntu). "
            f"As root: {' '.join(install_line(accounting=accounting))}"
        )
    # In run level 1 the packages' scripts start none of the services (invoke-rc.d(8)).
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["apt-get", "update"], install_line(accounting=accounting)):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise TestbedError(
                f"`{' '.join(command)}` failed: {done.stderr.strip()[-1000:]}. "
                "Repeat it by hand to see all of its output",
                returncode=done.returncode,
            )
