"""What a testbed needs on the machine, and how it gets there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable

from hpcresume.errors import TestbedError

_APT_INSTALL = ["apt-get", "install", "-y", "--no-install-recommends"]
_PACKAGES = ["slurm-wlm", "slurm-wlm-basic-plugins", "munge"]
_ACCOUNTING_PACKAGES = ["slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server"]
_RELEASE_PACKAGES = ["python3", "python3-venv", "procps", "ca-certificates"]
_RELEASE_TOOLS = ("debootstrap", "unshare", "setpriv", "pivot_root")
_BASIC = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "munged", "unshare")
_ACCOUNTING = ("slurmdbd", "sacctmgr", "sacct", "mariadbd", "mariadb-install-db")
# Daemons live where an ordinary user's PATH does not look.
SEARCH_PATH = os.pathsep.join(
    [os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"]
)


def missing(*, accounting: bool) -> list[str]:
    """Return the commands a testbed needs that are not on this machine."""
    return _absent(_BASIC + (_ACCOUNTING if accounting else ()))


def install_line(*, accounting: bool) -> list[str]:
    """Return the apt command that installs what a testbed needs."""
    names = _PACKAGES + (_ACCOUNTING_PACKAGES if accounting else [])
    return [*_APT_INSTALL, *names]


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


def release_packages() -> list[str]:
    """Return what another release needs to have in it."""
    return [*_PACKAGES, *_ACCOUNTING_PACKAGES, *_RELEASE_PACKAGES]


def require_release_tools() -> None:
    """Raise unless another release can be built and entered here.

    Raises:
        TestbedError: Not root, or commands are missing; with what to do.
    """
    absent = _absent(_RELEASE_TOOLS)
    if absent:
        raise TestbedError(
            f"not installed here: {', '.join(absent)}. Another release is built with debootstrap. "
            "As root: apt-get install debootstrap util-linux "
            "(or: hpcresume testbed up --release NAME --install)",
            missing=absent,
        )
    if os.geteuid() != 0:
        raise TestbedError(
            "another release needs root: it is entered as a root directory. Run it with sudo"
        )


def debian_mirror() -> str | None:
    """Return the mirror of Debian that apt is configured to use; None without one."""
    form = "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)"
    command = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("Debian|Debian|main|"):
            return line.rpartition("|")[2]
    return None


def install(*, accounting: bool) -> None:
    """Install what a testbed of this machine needs with apt, unless all is there.

    Raises:
        TestbedError: No apt here, not root, or apt failed.
    """
    if missing(accounting=accounting):
        _apt_install(install_line(accounting=accounting))


def install_release_tools() -> None:
    """Install what building another release needs with apt, unless all is there.

    Raises:
        TestbedError: No apt here, not root, or apt failed.
    """
    if _absent(_RELEASE_TOOLS):
        _apt_install([*_APT_INSTALL, "debootstrap"])


def _absent(commands: Iterable[str]) -> list[str]:
    return [name for name in commands if shutil.which(name, path=SEARCH_PATH) is None]


def _apt_install(line: list[str]) -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise TestbedError(
            "cannot install packages: that takes root and apt-get (Debian, Ubuntu). "
            f"As root: {' '.join(line)}"
        )
    # In run level 1 the packages' scripts start none of the services (invoke-rc.d(8)).
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["apt-get", "update"], line):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise TestbedError(
                f"`{' '.join(command)}` failed: {done.stderr.strip()[-1000:]}. "
                "Repeat it by hand to see all of its output",
                returncode=done.returncode,
            )
