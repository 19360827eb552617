"""The README does what it says: its commands and its first pipeline are run here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import hpcresume as hr
from hpcresume.cli import COMMANDS
from hpcresume.testbed import releases
from tests import session
from tests.support.cluster import cluster
from tests.support.local import Desk
from tests.support.places import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CI_RUN = REPOSITORY / ".ci" / "run"


def part_of(section: str) -> str:
    """Return the text of a section."""
    return README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]


def blocks(language: str, *, section: str = "") -> list[str]:
    """Return the code blocks in a language, of one section or of the whole README."""
    text = part_of(section) if section else README
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def write_site_files(home: Path) -> None:
    """Write every file that the section on sites shows, below a home directory."""
    section = part_of("Settings and sites")
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
    section = part_of("Evaluation")
    files = re.findall(r"^\| `(\w+\.jsonl?)`", section, flags=re.MULTILINE)
    assert 4 == len(files)
    assert [] == [name for name in files if not (tmp_path / "out" / name).exists()]
    rows = (tmp_path / "out" / "workflow_output.jsonl").read_text().splitlines()
    row = json.loads(rows[0])
    told = section.partition("A row has ")[2].partition(", and the dataset's")[0]
    keys = re.findall(r"`(\w+)`", told.replace("(`ok`, `error` or `timeout`)", ""))
    assert {*keys, "topic"} == set(row)


def test_what_is_told_and_reported_at_the_end(tmp_path: Path) -> None:
    """The command of --on-end has the status on its stdin, and the report is a page."""
    (tmp_path / "sentences.py").write_text(blocks("python", section="A first pipeline")[0])
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("One is small.")
    (commands,) = blocks("sh", section="Commands")
    commands = f"export HPCRESUME_TASK__ENGINE=inline PATH=$PATH:/bin\n{commands}"
    ended = shell(commands.replace("--on-end", "--cluster local --on-end"), tmp_path)

    assert 0 == ended.returncode, ended.stderr
    assert "complete" == json.loads((tmp_path / "ended.json").read_text())["state"]
    assert "<!doctype html>" in (tmp_path / "sentences.html").read_text()


def test_the_python_functions_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Submit, wait, collect and failures, as they stand, on this machine with two tasks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPCRESUME_TASK__LOCAL_DIR", str(tmp_path))
    monkeypatch.setenv("HPCRESUME_TASK__ENGINE", "inline")
    (tmp_path / "pipeline.py").write_text(
        "import hpcresume as hr\n"
        "pipeline = hr.Pipeline(name='p', sources=['3', '2', 'x'], stages=[int])\n"
    )
    (block,) = blocks("python", section="Commands")
    exec(block.replace("array=64", "array=2, cluster='local'"), {})

    assert "x ValueError invalid literal for int() with base 10: 'x'\n" == capsys.readouterr().out
    assert (tmp_path / "results.parquet").exists()


PORTED = {
    "filtered.py": '{"text": "' + "word " * 50 + '"}\n{"text": "too short"}\n',
    "counted.py": '{"text": "three words here"}\n',
    "sweep.py": "",
}


@pytest.mark.parametrize("name", PORTED)
def test_what_other_tools_scripts_become(tmp_path: Path, name: str) -> None:
    """Each second block of a pair runs, and gives what the first one would."""
    found = blocks("python", section="Coming from another tool")
    (block,) = [one for one in found if f"hpcresume submit {name}" in one.splitlines()[0]]
    desk = Desk.make(tmp_path)
    (tmp_path / name).write_text(block)
    desk.write("data/docs.jsonl", PORTED[name])
    few = ("-P", "n=3") if name == "sweep.py" else ()
    ended = desk.submit(name, "--run-dir", "run", *few)

    assert 0 == ended.code, ended
    rows = [json.loads(line) for line in desk.rows("run").splitlines()]
    assert {
        "filtered.py": [{"text": "word " * 50}],
        "counted.py": [{"text": "three words here", "words": 3}],
        "sweep.py": [{"seed": i, "energy": (i * 7919) % 101} for i in range(3)],
    }[name] == rows


def test_the_terminal_session_is_the_one_that_was_played() -> None:
    """The block between the marks tells of all that happened, and the picture shows it."""
    played = README.partition(session.BEGIN)[2].partition(session.END)[0].splitlines()[1:-1]

    typed = [line.split()[1:3] for line in played if line.startswith("$ ")]
    assert [
        ["hpcresume", "submit"],
        ["hpcresume", "status"],
        ["hpcresume", "testbed"],
        ["hpcresume", "testbed"],
        ["hpcresume", "status"],
        ["hpcresume", "collect"],
        ["wc", "-l"],
    ] == typed
    assert session.picture(played) == session.PICTURE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.slurm
def test_the_terminal_session_plays_again() -> None:
    """A preempted task and a lost node later the run is complete, as the README shows."""
    with cluster(nodes=4, cpus_per_node=1) as own:
        lines = session.play(own).lines
    played = README.partition(session.BEGIN)[2].partition(session.END)[0]

    def commands(text: list[str]) -> list[str]:
        typed = [re.sub(r"tb[0-9a-f]{6}n", "n", line) for line in text if line.startswith("$ ")]
        return [re.sub(r"\d+", "N", line) for line in typed]

    assert commands(played.splitlines()) == commands(lines)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(2400)
def test_installing_from_a_fresh_clone(tmp_path: Path) -> None:
    """The command of the section on installing leaves a row per function of the library."""
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache")
    shutil.copytree(REPOSITORY, clone, ignore=ignored)
    (command,) = blocks("console", section="Install")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["/bin/bash", "-c", command],
        cwd=clone,
        env={**env, "HPCRESUME_TASK__LOCAL_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 == done.returncode, done.stderr
    rows = [json.loads(line) for line in (clone / "out.jsonl").open(encoding="utf-8")]
    assert {"json/__init__.py": "dumps"}.items() <= {
        row["file"]: row["name"] for row in rows if row["name"] == "dumps"
    }.items()
    assert len(rows) > 5000


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(0, id="here"),
        pytest.param(
            1,
            id="trixie",
            marks=pytest.mark.skipif(
                releases.here() is not None, reason="a release is built from outside"
            ),
        ),
    ],
)
def test_the_testbeds_of_the_readme(number: int) -> None:
    """
    A testbed comes up, a run on it completes, and it goes down, as the section shows it: with
    this machine's Slurm, and with that of another release of Debian.
    """
    script = blocks("sh", section="Testbed")[number]
    submitted = [line for line in script.splitlines() if "hpcresume submit" in line]
    watch = submitted[0].partition("hpcresume submit")[0] + "hpcresume status --watch"
    with tempfile.TemporaryDirectory(prefix="hpcr-") as name:
        home = Path(name)
        (home / "sentences.py").write_text(blocks("python", section="A first pipeline")[0])
        (home / "texts").mkdir()
        (home / "texts" / "a.txt").write_text("One is small. Three is a longer sentence.")
        script = script.replace(submitted[0], f"{submitted[0]} --engine inline\n{watch}")
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        env |= {"XDG_STATE_HOME": name, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
        try:
            done = subprocess.run(
                ["/bin/bash", "-ec", script],
                cwd=home, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                check=False,
            )  # fmt: skip
        finally:
            down = [sys.executable, "-m", "hpcresume", "testbed", "down"]
            subprocess.run(down, cwd=home, env=env, capture_output=True, check=False)

        assert 0 == done.returncode, (done.stdout, done.stderr)
        assert "1 of 1 source done" in done.stdout, (done.stdout, done.stderr)


@pytest.mark.slow
def test_the_evaluation_of_real_code(tmp_path: Path) -> None:
    """The command over HumanEval runs as it stands, here on the first candidates."""
    _, command = blocks("sh", section="Evaluation")
    ended = shell(f"export PATH=$PATH:/bin:/usr/bin\n{command.rstrip()} --limit 20", tmp_path)

    assert 0 == ended.returncode, ended.stderr
    rows = (tmp_path / "humaneval" / "workflow_output.jsonl").read_text().splitlines()
    assert 20 == len(rows)


def test_the_fragments_of_pipelines(tmp_path: Path) -> None:
    """What the section on pipelines shows in part is a stage, a stage over chunks, and a sink."""
    embed, documents, sink = blocks("python", section="Pipelines")
    names: dict[str, Any] = {"hr": hr, "Iterator": Iterator, "pa": pa}
    for block in (embed, documents, sink):
        exec(block, names)
    (tmp_path / "in.jsonl").write_text(
        '{"id": 1, "lang": "en", "text": "two words"}\n{"id": 2, "lang": "de", "text": "nein"}\n'
    )
    (source,) = hr.chunks(tmp_path / "in.jsonl")

    hr.Pipeline("p", [], [names["Embed"](), names["documents"]], sink=names["sink"])
    assert (64, 1) == (names["Embed"].batch_size, names["Embed"].gpus)
    assert [{"id": 1, "words": 2}] == list(names["documents"](source.payload))


def test_the_stage_of_serving() -> None:
    """The stage of the section on serving is made of what the block defines."""
    names: dict[str, Any] = {}
    (block,) = blocks("python", section="Serving")
    exec(block, names)

    hr.Pipeline("p", [], [names["stage"]])
    assert isinstance(names["stage"], hr.ServingStage)


def test_python_blocks_compile() -> None:
    """Every Python block is Python."""
    found = blocks("python")

    assert found
    for block in found:
        compile(block, "README.md", "exec")


def test_every_command_is_in_the_readme() -> None:
    """The table of commands holds every command there is, and no other."""
    table = part_of("Commands")
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


SHOWN_BY = {
    ("What it looks like", "text"): [test_the_terminal_session_plays_again],
    ("Install", "console"): [test_installing_from_a_fresh_clone],
    ("A first pipeline", "python"): [test_first_pipeline],
    ("A first pipeline", "sh"): 2 * [test_first_pipeline],
    ("A first pipeline", "json"): [test_first_pipeline],
    ("Pipelines", "python"): 3 * [test_the_fragments_of_pipelines],
    ("Evaluation", "python"): [test_evaluation],
    ("Evaluation", "sh"): [test_evaluation, test_the_evaluation_of_real_code],
    ("Serving", "python"): [test_the_stage_of_serving],
    # Of each pair the first block is another tool's.
    ("Coming from another tool", "python"): 3 * [None, test_what_other_tools_scripts_become],
    ("Settings and sites", "toml"): [test_the_site_of_the_readme_renders],
    ("Settings and sites", "jinja"): [test_the_site_of_the_readme_renders],
    ("Settings and sites", "bash"): [test_the_site_of_the_readme_renders],
    ("Commands", "sh"): [test_what_is_told_and_reported_at_the_end],
    ("Commands", "python"): [test_the_python_functions_of_the_readme],
    ("How it works", "text"): [None],  # a diagram
    ("Testbed", "sh"): 2 * [test_the_testbeds_of_the_readme],
    ("Development", "console"): [test_ci_runs_the_command_of_the_readme],
}
"""Section and language -> the test that runs each of its blocks, in their order."""


def test_every_block_has_a_test() -> None:
    """A block that is added to the README, or moved, needs a test that runs it."""
    found: dict[tuple[str, str], int] = {}
    for section in re.findall(r"^## (.+)$", README, flags=re.MULTILINE):
        for language in re.findall(
            r"^```(\w*)\n.*?^```$", part_of(section), re.DOTALL | re.MULTILINE
        ):
            found[section, language] = found.get((section, language), 0) + 1

    assert {key: len(tests) for key, tests in SHOWN_BY.items()} == found
