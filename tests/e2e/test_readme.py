"""The README does what it says: its commands and its first pipeline are run here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpcresume.cli import COMMANDS
from tests.support.places import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CI_RUN = REPOSITORY / ".ci" / "run"


def blocks(language: str, *, section: str = "") -> list[str]:
    """Return the code blocks in a language, of one section or of the whole README."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0] if section else README
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def write_site_files(home: Path) -> None:
    """Write every file that the section on sites shows, below a home directory."""
    section = README.partition("\n## Settings and sites\n")[2].partition("\n## ")[0]
    found = re.findall(r"^`~/(\S+)`:\n\n```\w+\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert ["sites/ours/site.toml", "sites/ours/job.sh.j2"] == [name for name, _ in found]
    for name, text in found:
        path = home / name
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o644)


def shell(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a script as a user would type it, with ``hpcresume`` as it is installed here."""
    command = f'hpcresume() {{ "{sys.executable}" -m hpcresume "$@"; }}\n{script}'
    env = {
        **os.environ,
        "HPCRESUME_TASK__LOCAL_DIR": str(directory),
        # The words are those of a machine without Slurm.
        "PATH": "/bin" if not os.path.exists("/bin/sbatch") else str(tools(directory)),
    }
    return subprocess.run(
        ["/bin/bash", "-c", command],
        cwd=directory,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def tools(directory: Path) -> Path:
    """Return a directory for PATH that holds what the README's scripts use, and no sbatch."""
    made = directory / "bin"
    if not made.exists():
        made.mkdir()
        for name in ("mkdir", "cat"):
            (made / name).symlink_to(f"/bin/{name}")
    return made


def test_ci_runs_the_command_of_the_readme() -> None:
    """CI runs the test command that the README gives, to the letter."""
    commands = [line for block in blocks("console") for line in block.splitlines()]
    in_readme = [line for line in commands if "-m tests --install" in line]

    assert 1 == len(in_readme)
    assert in_readme[0] in CI_RUN.read_text(encoding="utf-8").splitlines()
    assert os.access(CI_RUN, os.X_OK)


@pytest.mark.ray
def test_first_pipeline(tmp_path: Path) -> None:
    """Every step of the first pipeline works, and the result is the one that is shown."""
    (pipeline,) = blocks("python", section="A first pipeline")
    first, repaired = blocks("sh", section="A first pipeline")
    (shown,) = blocks("json", section="A first pipeline")
    (tmp_path / "sentences.py").write_text(pipeline)

    ended = shell(first, tmp_path)
    assert 1 == ended.returncode, ended.stderr
    assert "incomplete" in ended.stderr
    assert "2 completed, 1 quarantined" in ended.stderr
    # Without `set -e`: of a run that ended incomplete `status` exits with 1.
    ended = shell(repaired, tmp_path)
    assert 0 == ended.returncode, ended.stderr
    assert "c.txt: quarantined after 3 attempts, stage read" in ended.stdout
    assert "3: 0 new, 2 done, 1 left" in ended.stderr
    assert shown == (tmp_path / "sentences.jsonl").read_text()


def test_evaluation(tmp_path: Path) -> None:
    """The evaluation runs as it stands, once for each item, and its files are there."""
    (code,) = blocks("python", section="Evaluation")
    commands, _ = blocks("sh", section="Evaluation")
    (tmp_path / "flow.py").write_text(code)

    ended = shell(commands, tmp_path)

    assert 1 == ended.returncode, ended.stderr
    assert 2 == ended.stderr.count("2 ok, 2 errors, 0 timeouts, 0 missing of 4"), ended.stderr
    section = README.partition("\n## Evaluation\n")[2].partition("\n## ")[0]
    files = re.findall(r"^\| `(\w+\.jsonl?)`", section, flags=re.MULTILINE)
    assert 4 == len(files)
    assert [] == [name for name in files if not (tmp_path / "out" / name).exists()]
    rows = (tmp_path / "out" / "workflow_output.jsonl").read_text().splitlines()
    row = json.loads(rows[0])
    told = section.partition("A row has ")[2].partition(", and the dataset's")[0]
    keys = re.findall(r"`(\w+)`", told.replace("(`ok`, `error` or `timeout`)", ""))
    assert {*keys, "topic"} == set(row)


def test_python_blocks_compile() -> None:
    """Every Python block is Python."""
    found = blocks("python")

    assert found
    for block in found:
        compile(block, "README.md", "exec")


def test_every_command_is_in_the_readme() -> None:
    """The table of commands holds every command there is, and no other."""
    table = README.partition("\n## Commands\n")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `([a-z]+)", table, flags=re.MULTILINE))

    assert set(COMMANDS) == documented


def test_the_site_of_the_readme_renders(tmp_path: Path) -> None:
    """The site's files are taken as they stand, and end in the batch script."""
    write_site_files(tmp_path)
    (tmp_path / "sentences.py").write_text(blocks("python", section="A first pipeline")[0])
    (tmp_path / "texts").mkdir()
    (commands,) = blocks("bash", section="Settings and sites")

    ended = shell(
        f"set -e\nHOME={tmp_path}\n{commands}\nhpcresume render sentences.py --site ours", tmp_path
    )

    assert 0 == ended.returncode, ended.stderr
    lines = ended.stdout.splitlines()
    assert {
        "module load StdEnv/2023 python/3.12",
        "module load arrow/21",
        "#SBATCH --account=def-physics",
        "#SBATCH --time=02:00:00",
    } <= set(lines)
    explained = next(line for line in lines if line.startswith("request.account"))
    assert f"{tmp_path}/sites/ours/site.toml" in explained


def test_files_that_are_named_exist() -> None:
    """Every test that the README points to is there."""
    named = set(re.findall(r"`(tests/[\w/.]+)`", README))

    assert named
    assert [] == [name for name in named if not (REPOSITORY / name).exists()]
