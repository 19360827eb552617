"""Loading a pipeline from a user's file or module, and from a run's copy of it.

A loaded file is registered in ``sys.modules`` under its own name, so that what it defines
pickles by reference between workers.  Its directory stays importable, as it is for a
script.  One process holds one loaded pipeline: the next load forgets the modules of the
one before, so that two files with one name, or an edited file, never mix.

A snapshot is the pipeline's file, the modules beside it that it imports (also those that
a stage imports only when called), and what ``Pipeline(snapshot=[...])`` names.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import msgspec

from hpcresume.errors import (
    CorruptDataError,
    HpcResumeError,
    PipelineError,
    StageStartError,
    UsageError,
)
from hpcresume.pipeline.finder import CopyFinder
from hpcresume.pipeline.params import convert_parameters, to_json
from hpcresume.pipeline.pipeline import Pipeline
from hpcresume.pipeline.siblings import is_library, is_users, sibling_files
from hpcresume.pipeline.target import (
    DEFAULT_ATTR,
    PipelineSpec,
    no_bytecode,
    parse_target,
    split_target,
)

__all__ = [
    "LoadedPipeline",
    "PipelineSpec",
    "load_pipeline",
    "load_snapshot",
    "parse_target",
    "write_snapshot",
]

SNAPSHOT_FILE = "pipeline.json"


class LoadedPipeline(msgspec.Struct, frozen=True):
    """A pipeline with what is needed to load it again elsewhere.

    Attributes:
        pipeline: The pipeline.
        params: What it was made with, as JSON values.
        files: Its file first, then what else belongs into a snapshot; all below its directory.
        spec: Where it came from.
    """

    pipeline: Pipeline
    params: dict[str, Any]
    files: tuple[Path, ...]
    spec: PipelineSpec


class _Process(msgspec.Struct):
    """What this process has loaded so far."""

    module: str | None = None
    directory: Path | None = None
    before: frozenset[str] = frozenset()
    paths: list[str] = msgspec.field(default_factory=list)

    def modules(self) -> list[str]:
        """Return the names of the modules that came from the pipeline's directory."""
        below = [] if self.directory is None else _modules_below(self.directory, self.before)
        return below if self.module is None else [self.module, *below]


_process = _Process()


def load_pipeline(spec: PipelineSpec | Path, params: Mapping[str, Any]) -> LoadedPipeline:
    """Import a pipeline's file and make the pipeline.

    Args:
        spec: Where it is: what :func:`parse_target` returned, or a snapshot's directory.
        params: Texts or values for the parameters of its function.

    Raises:
        PipelineError: The file does not import, its function raises, or there is no pipeline.
        UsageError: A parameter is wrong.
    """
    if isinstance(spec, Path):
        spec = _snapshot_spec(spec, _read_manifest(spec))
    return _load(spec, params)


def write_snapshot(loaded: LoadedPipeline, directory: Path) -> dict[str, str]:
    """Copy a pipeline's files, and what is needed to load them, into ``directory``.

    Returns:
        The SHA-256 of each file by its name relative to the pipeline's directory.
    """
    root = loaded.spec.path.parent
    digests = {}
    for path in loaded.files:
        name = path.relative_to(root).as_posix()
        data = path.read_bytes()
        _write(directory / name, data)
        digests[name] = hashlib.sha256(data).hexdigest()
    spec = loaded.spec
    manifest = {
        "target": spec.target,
        "kind": spec.kind,
        "module": spec.module,
        "attr": spec.attr,
        "main": spec.path.name,
        "import_root": None if spec.import_root is None else str(spec.import_root),
        "params": loaded.params,
        "files": digests,
    }
    _write(directory / SNAPSHOT_FILE, json.dumps(manifest, indent=1, sort_keys=True).encode())
    return digests


def load_snapshot(directory: Path) -> LoadedPipeline:
    """Load a pipeline from a run's copy of it, and from nothing else.

    The parent package of a dotted module is imported as usual; the module itself comes
    from the copy.

    Raises:
        CorruptDataError: A file of the copy is not the one that was written.
        StageStartError: It does not import or does not make a pipeline here.
    """
    manifest = _read_manifest(directory)
    spec = _snapshot_spec(directory, manifest)
    # For good: a stage that imports its helpers late must not write into the run either.
    sys.dont_write_bytecode = True
    place = str(spec.path.parent)
    sys.path_importer_cache[place] = CopyFinder(place)
    try:
        return _load(spec, manifest["params"])
    except (PipelineError, UsageError) as error:
        raise StageStartError(
            f"the run's copy of the pipeline cannot be loaded on {os.uname().nodename}: {error}",
            snapshot=str(directory),
        ) from error


def _load(spec: PipelineSpec, params: Mapping[str, Any]) -> LoadedPipeline:
    module = _import(spec)
    attr = spec.attr or _default_attr(module, spec)
    pipeline, recorded = _build(module, spec, attr, params)
    resolved = msgspec.structs.replace(spec, attr=attr)
    return LoadedPipeline(pipeline, recorded, _files(pipeline, spec), resolved)


def _import(spec: PipelineSpec) -> ModuleType:
    _forget()
    _refuse_shadowing(spec)
    directory = spec.path.parent
    is_dotted = "." in spec.module
    # A package's own directory is not a place to import from.
    front = [] if is_dotted else [str(directory)]
    root = str(spec.import_root)
    back = [root] if spec.import_root and root not in sys.path else []
    before = frozenset(sys.modules)
    importlib.invalidate_caches()
    # It stays in front, before the working directory: a late import in a task must find the
    # run's copy, not the original that may lie there.
    sys.path[:0] = front
    sys.path.extend(back)
    try:
        with no_bytecode():
            return _execute(spec)
    finally:
        _process.module, _process.before = spec.module, before | {spec.module}
        _process.paths = front + back
        _process.directory = None if is_dotted or is_library(directory) else directory


def _execute(spec: PipelineSpec) -> ModuleType:
    parent, _, leaf = spec.module.rpartition(".")
    try:
        package = importlib.import_module(parent) if parent else None
        loader = _FreshLoader(spec.module, str(spec.path))
        found = importlib.util.spec_from_file_location(spec.module, spec.path, loader=loader)
        assert found is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[spec.module] = module
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(spec.module, None)
        raise _import_error(spec, error) from error
    if package is not None:
        setattr(package, leaf, module)
    return module


class _FreshLoader(importlib.machinery.SourceFileLoader):
    """Compiles the source each time: cached code is told from old by whole seconds."""

    def path_stats(self, path: str) -> Mapping[str, Any]:
        raise OSError(f"no cached code of {path}")


def _forget() -> None:
    """Undo the load before this one."""
    for name in _process.modules():
        sys.modules.pop(name, None)
    for entry in _process.paths:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)
    _process.module, _process.directory, _process.paths = None, None, []


def _refuse_shadowing(spec: PipelineSpec) -> None:
    loaded = sys.modules.get(spec.module)
    is_other = loaded is not None and getattr(loaded, "__file__", None) != str(spec.path)
    if "." not in spec.module and (is_other or spec.module in sys.stdlib_module_names):
        raise PipelineError(
            f"{spec.target}: a module named {spec.module!r} exists already, and importing this "
            "file under that name would hide it from everything that needs it. "
            f"Rename the file, for example to {spec.module}_pipeline.py.",
            path=str(spec.path),
        )


def _modules_below(directory: Path, before: frozenset[str]) -> list[str]:
    files = {
        name: Path(str(module.__file__))
        for name, module in sys.modules.items()
        if name not in before and getattr(module, "__file__", None)
    }
    return sorted(n for n, f in files.items() if f.is_relative_to(directory) and is_users(f))


def _default_attr(module: ModuleType, spec: PipelineSpec) -> str:
    if hasattr(module, DEFAULT_ATTR):
        return DEFAULT_ATTR
    candidates = _candidates(module)
    if len(candidates) == 1:
        return candidates[0]
    found = f"there are {', '.join(candidates)}" if candidates else "there is none"
    raise PipelineError(
        f"{spec.path}: which pipeline is meant? {found}. "
        "By default it is the one named 'pipeline', or the only Pipeline or function "
        f"annotated -> Pipeline. {_advice(spec, candidates)}",
        path=str(spec.path),
        candidates=candidates,
    )


def _candidates(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (isinstance(value, Pipeline) or _returns_pipeline(value, module.__name__))
    ]


def _returns_pipeline(value: Any, module: str) -> bool:
    if not callable(value) or isinstance(value, type) or value.__module__ != module:
        return False
    returns = getattr(value, "__annotations__", {}).get("return")
    if isinstance(returns, str):
        return returns.strip("'\"").rpartition(".")[2] == Pipeline.__name__
    return returns is Pipeline


def _advice(spec: PipelineSpec, candidates: list[str]) -> str:
    location = split_target(spec.target)[0]
    if not candidates:
        return "Define pipeline() -> hr.Pipeline in it."
    return f"Give {location}:{candidates[0]}."


def _build(
    module: ModuleType, spec: PipelineSpec, attr: str, params: Mapping[str, Any]
) -> tuple[Pipeline, dict[str, Any]]:
    if not hasattr(module, attr):
        raise _no_such_attribute(module, spec, attr)
    value = getattr(module, attr)
    if isinstance(value, Pipeline):
        convert_parameters(lambda: value, params)
        return value, {}
    if not callable(value):
        raise _not_a_pipeline(spec, attr, value)
    converted = convert_parameters(value, params)
    recorded = {name: to_json(inner) for name, inner in converted.items()}
    made = _call(value, converted, spec, attr)
    if not isinstance(made, Pipeline):
        raise _not_a_pipeline(spec, f"{attr}()", made)
    return made, recorded


def _call(fn: Any, params: Mapping[str, Any], spec: PipelineSpec, attr: str) -> Any:
    try:
        return fn(**params)
    except HpcResumeError:
        raise
    except (Exception, SystemExit) as error:
        frames = _user_frames(error.__traceback__)
        raise PipelineError(
            f"{_place(spec, error, frames)}: {attr}() raised {_brief(error)} "
            f"It has to return the pipeline.{_trace_text(frames)}",
            path=str(spec.path),
        ) from error


def _no_such_attribute(module: ModuleType, spec: PipelineSpec, attr: str) -> PipelineError:
    candidates = _candidates(module)
    names = candidates + [name for name in vars(module) if not name.startswith("__")]
    near = difflib.get_close_matches(attr, names, n=1)
    suggestion = f" Did you mean {near[0]!r}?" if near else ""
    listed = f" Pipelines in it: {', '.join(candidates)}." if candidates else ""
    return PipelineError(
        f"{spec.path}: there is no {attr!r} in it.{suggestion}{listed} {_advice(spec, candidates)}",
        path=str(spec.path),
        candidates=candidates,
    )


def _not_a_pipeline(spec: PipelineSpec, what: str, value: Any) -> PipelineError:
    hint = " Does the function end without `return`?" if value is None else ""
    return PipelineError(
        f"{spec.path}: {what} is {value!r} ({type(value).__qualname__}), not a Pipeline. "
        f"Give an hr.Pipeline, or a function that returns one.{hint}",
        path=str(spec.path),
    )


def _import_error(spec: PipelineSpec, error: BaseException) -> PipelineError:
    frames = _user_frames(error.__traceback__)
    remedy = "" if isinstance(error, HpcResumeError) else f" To try it alone: python {spec.path}"
    return PipelineError(
        f"{_place(spec, error, frames)}: {_brief(error)} "
        f"The pipeline's file does not import.{remedy}{_trace_text(frames)}",
        path=str(spec.path),
    )


def _place(spec: PipelineSpec, error: BaseException, frames: list[traceback.FrameSummary]) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    directory = str(spec.path.parent) + os.sep
    own = [frame for frame in frames if frame.filename.startswith(directory)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else str(spec.path)


def _user_frames(tb: TracebackType | None) -> list[traceback.FrameSummary]:
    """Return the frames that are neither ours nor the import system's."""
    hidden = ("<frozen importlib", str(Path(__file__).parent), importlib.__file__)
    return [f for f in traceback.extract_tb(tb) if not f.filename.startswith(hidden)]


def _brief(error: BaseException) -> str:
    """Return an exception in one line that ends in a full stop; our own says all itself."""
    if isinstance(error, HpcResumeError):
        return str(error)
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    return text if text.endswith(".") else f"{text}."


def _trace_text(frames: list[traceback.FrameSummary]) -> str:
    if not frames:
        return ""
    return "\n" + "".join(traceback.format_list(frames)).rstrip()


def _files(pipeline: Pipeline, spec: PipelineSpec) -> tuple[Path, ...]:
    root = spec.path.parent
    found = {spec.path: None}
    for named in pipeline.snapshot:
        found |= dict.fromkeys(_named_files(root, named, spec))
    if _process.directory is not None:
        imported = (sys.modules[name] for name in _process.modules() if name in sys.modules)
        found |= dict.fromkeys(Path(str(module.__file__)) for module in imported)
        found |= dict.fromkeys(sibling_files(found, root))
    return tuple(found)


def _named_files(root: Path, named: str, spec: PipelineSpec) -> Iterator[Path]:
    path = Path(os.path.abspath(root / named))
    if not path.exists() or not path.is_relative_to(root):
        why = "does not exist" if not path.exists() else f"is not below {root}"
        raise PipelineError(
            f"{spec.path}: snapshot={named!r} {why}. "
            "What it names is copied into the run, beside the pipeline's file. "
            "Give paths relative to that file.",
            path=str(path),
        )
    if path.is_dir():
        inside = (p for p in sorted(path.rglob("*")) if "__pycache__" not in p.parts)
        yield from filter(Path.is_file, inside)
    else:
        yield path


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / SNAPSHOT_FILE
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptDataError(
            f"{path}: the run's copy of the pipeline cannot be read: {error}. "
            "Tasks run nothing else. Submit the pipeline's file again to renew it.",
            path=str(path),
        ) from error
    for name, digest in manifest["files"].items():
        _verify(directory / name, digest)
    return manifest


def _verify(path: Path, digest: str) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        found = "missing"
    if found != digest:
        state = "is missing" if found == "missing" else "was changed"
        raise CorruptDataError(
            f"{path} {state} since it was written. "
            "A run's tasks execute one version of the code. "
            "Edit the original and submit it again to renew the copy.",
            path=str(path),
        )


def _snapshot_spec(directory: Path, manifest: Mapping[str, Any]) -> PipelineSpec:
    import_root = manifest["import_root"]
    return PipelineSpec(
        target=manifest["target"],
        kind=manifest["kind"],
        path=Path(os.path.abspath(directory)) / manifest["main"],
        module=manifest["module"],
        attr=manifest["attr"],
        import_root=None if import_root is None else Path(import_root),
    )


def _write(path: Path, data: bytes) -> None:
    _make_private(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _make_private(path: Path) -> None:
    if not path.exists():
        _make_private(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
