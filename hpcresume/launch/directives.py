"""The ``#SBATCH`` lines of a job: which options, how spelled at this site, how quoted.

sbatch does not read these lines as a shell does.  Outside quotes a blank ends the value;
a backslash escapes the next character everywhere, within single quotes too; an escaped
blank outside quotes still ends the value (Slurm, src/sbatch/opt.c, _get_argument).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import msgspec

from hpcresume.config import Request, Resolved
from hpcresume.config.files import has_control_character
from hpcresume.errors import ConfigError

_PLAIN = re.compile(r"[A-Za-z0-9@%+=:,./_-]+")
_MEMORY = re.compile(r"(?P<size>\d+)(?P<unit>[KMGT]?)B?", re.IGNORECASE)
_KILOBYTES = {"K": 1, "": 1024, "M": 1024, "G": 1024**2, "T": 1024**3}
_OURS = frozenset(
    {
        *("array", "dependency", "error", "job-name", "kill-on-invalid-dep", "no-requeue"),
        *("nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "requeue"),
        *("signal", "test-only", "wait", "wrap"),
    }
)


class Directives(msgspec.Struct, frozen=True):
    """The options of a job: ``kept`` go into its script, ``dropped`` the site forbids.

    A value of None is an option without one.
    """

    kept: tuple[tuple[str, str | None], ...]
    dropped: tuple[tuple[str, str | None], ...]

    def lines(self) -> list[str]:
        """Return the kept options as they follow ``#SBATCH``."""
        return [_spell(name, value) for name, value in self.kept]

    def dropped_lines(self) -> list[str]:
        """Return the dropped options, spelled like the kept ones."""
        return [_spell(name, value) for name, value in self.dropped]


def site_directives(
    options: Mapping[str, str | None], extra: Iterable[str], resolved: Resolved
) -> Directives:
    """Return a job's options as the site takes them.

    Args:
        options: Options by name; an empty value leaves the option out, None has no value.
        extra: Further options, ``--name`` or ``--name=value``; each replaces one of
            ``options`` of the same name.
        resolved: Settings, with what the site forbids and requires.

    Raises:
        ConfigError: A value with a control character, an extra option that would change
            what the job is, or an option missing that the site requires.
    """
    wanted = {name: value for name, value in options.items() if value != ""}
    wanted |= dict(_extra(option) for option in extra)
    for name, value in wanted.items():
        refuse_line_break(value or "", what=f"--{name}")
    site = resolved.settings.site
    kept = {name: value for name, value in wanted.items() if name not in site.forbidden}
    missing = [name for name in site.required if name not in kept]
    if missing:
        options_text = " and ".join(f"--{name}" for name in missing)
        raise ConfigError(
            f"site {site.name!r} requires {options_text}, and nothing sets it. Slurm would refuse "
            f"the job. Give it to submit as sbatch spells it, or set it under [request] in "
            "hpcresume.toml",
            missing=missing,
        )
    dropped = tuple(item for item in wanted.items() if item[0] in site.forbidden)
    return Directives(tuple(kept.items()), dropped)


def request_options(request: Request, resolved: Resolved) -> dict[str, str | None]:
    """Return what an array task asks for, memory and GPUs in the site's spelling."""
    cpus = max(1, request.cpus_per_task)
    return {
        "cpus-per-task": str(cpus),
        **_memory(request.mem, cpus=cpus, style=resolved.settings.site.memory_style),
        **_gpus(request.gpus_per_task, style=resolved.settings.site.gpu_style),
        "time": request.time,
        "account": request.account,
        "partition": request.partition,
        "qos": request.qos,
        "constraint": request.constraint,
        "reservation": request.reservation,
        "exclude": request.exclude,
        "nodelist": request.nodelist,
    }


def merge_options(resolved: Resolved) -> dict[str, str | None]:
    """Return what the merge job asks for; ``[request]`` fills what ``[merge]`` leaves empty."""
    merge, request = resolved.settings.merge, resolved.settings.request
    style = resolved.settings.site.memory_style
    return {
        "cpus-per-task": str(merge.cpus_per_task),
        **_memory(merge.mem, cpus=merge.cpus_per_task, style=style),
        "time": merge.time,
        "account": merge.account or request.account,
        "partition": merge.partition or request.partition,
        "qos": merge.qos or request.qos,
        "constraint": merge.constraint or request.constraint,
        # Also nodes that an earlier round found broken.
        "exclude": request.exclude,
    }


def refuse_line_break(text: str, *, what: str) -> None:
    """Refuse a text that would end its line.

    Raises:
        ConfigError: The text holds a newline, NUL or another control character.
    """
    if has_control_character(text):
        raise ConfigError(
            f"{what} {text!r} holds a control character. A newline would start another line of "
            "the batch script. Remove it"
        )


def _spell(name: str, value: str | None) -> str:
    return f"--{name}" if value is None else f"--{name}={quote(value)}"


def quote(value: str) -> str:
    """Return a value as one word for sbatch's reader of ``#SBATCH`` lines."""
    if _PLAIN.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _extra(option: str) -> tuple[str, str | None]:
    name, equals, value = option.removeprefix("--").partition("=")
    if not option.startswith("--") or not name or name in _OURS:
        raise ConfigError(
            f"sbatch option {option!r} cannot be given: it is not a long option (--name=value), "
            "or hpcresume sets it itself and the run depends on it. Leave it out",
            option=option,
        )
    return name, value if equals else None


def _memory(mem: str, *, cpus: int, style: str) -> dict[str, str | None]:
    if not mem or style == "none":
        return {}
    if style == "mem":
        return {"mem": mem}
    return {"mem-per-cpu": f"{-(-_kilobytes(mem) // (1024 * cpus))}M"}


def mebibytes(mem: str) -> int:
    """Return the MiB of a size as sbatch spells it, rounded up."""
    return -(-_kilobytes(mem) // 1024)


def _kilobytes(mem: str) -> int:
    match = _MEMORY.fullmatch(mem)
    assert match is not None, "the settings' pattern admits nothing else"
    return int(match["size"]) * _KILOBYTES[match["unit"].upper()]


def _gpus(count: int, *, style: str) -> dict[str, str | None]:
    if not count or style == "none":
        return {}
    return {"gres": f"gpu:{count}"} if style == "gres" else {style: str(count)}
