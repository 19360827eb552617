"""The user's code: workflows, scorers and callbacks by name, called whatever kind they are of.

A workflow is ``async def f(item, **params)``, ``def f(item, **params)``, or a Stage, whose
set-up is done once.  Every synchronous call has a thread of its own, which a hung one keeps:
neither the event loop nor another item waits for it.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpcresume.errors import HpcResumeError, PipelineError
from hpcresume.pipeline.context import Context, Worker
from hpcresume.pipeline.params import convert_parameters
from hpcresume.pipeline.stage import Stage
from hpcresume.pipeline.target import no_bytecode, parse_target

_CANCEL_GRACE_S = 1.0


def load_object(target: str, cwd: Path) -> Any:
    """Return what ``module:name`` or ``file.py:name`` names.

    Raises:
        PipelineError: There is no such thing, or its module does not import.
    """
    spec = parse_target(target, cwd)
    if spec.attr is None:
        raise PipelineError(f"{target}: give the name in it, too: {target}:NAME.")
    root = str(spec.path.parent if spec.kind == "file" else cwd)
    if root not in sys.path:
        sys.path.append(root)
    try:
        with no_bytecode():
            module = _import_file(spec.module, spec.path) if spec.kind == "file" else None
            module = module or importlib.import_module(spec.module)
    except HpcResumeError:
        raise
    except (Exception, SystemExit) as error:
        raise PipelineError(
            f"{target}: {spec.path} does not import: {type(error).__name__}: {error}."
        ) from error
    if not hasattr(module, spec.attr):
        raise PipelineError(f"{target}: there is no {spec.attr!r} in {spec.path}.")
    return getattr(module, spec.attr)


def _import_file(name: str, path: Path) -> Any:
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    # A file keeps out of the way of a module that has its name already.
    unique = name if loaded is None and name not in sys.stdlib_module_names else f"{name}_file"
    found = importlib.util.spec_from_file_location(unique, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[unique] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[unique]
        raise
    return module


class UserCall:
    """A workflow or a scorer, ready to be called.

    Args:
        target: Its name.
        cwd: Directory that the name is meant from.
        params: Its keyword arguments, as texts or values.
        leading: Number of positional arguments that it is called with.

    Raises:
        PipelineError: It cannot be loaded or called.
        UsageError: A parameter is unknown, missing or of the wrong type.
    """

    def __init__(
        self, target: str, cwd: Path, params: Mapping[str, Any] | None = None, *, leading: int = 1
    ) -> None:
        self.target = target
        self.name = target.rpartition(":")[2]
        found = load_object(target, cwd)
        self.stage: Stage | None = None
        if isinstance(found, type) and issubclass(found, Stage):
            found = found(**_converted(found.__init__, params or {}, leading=1))
        elif not isinstance(found, Stage):
            found = _with_params(found, target, params or {}, leading)
        if isinstance(found, Stage):
            self.stage = found
            if found.traits.is_batch:
                raise PipelineError(f"{target}: takes batches; items are evaluated one by one.")
        self._call: Callable[..., Any] = found.process if isinstance(found, Stage) else found
        self.wants_context = self.stage is not None and self.stage.traits.wants_context
        self._is_async = _is_async(self._call)

    def setup(self, worker: Worker) -> None:
        """Set it up, once."""
        if self.stage is not None:
            self.stage.setup(worker)

    def teardown(self) -> None:
        """Release what it set up."""
        if self.stage is not None:
            self.stage.teardown()

    async def __call__(self, *arguments: Any, context: Context | None = None) -> Any:
        """Call it and return what it answers."""
        if self.wants_context and context is not None and len(arguments) == 1:
            arguments = (*arguments, context)
        if self._is_async:
            return await self._call(*arguments)
        answer = await in_thread(self._call, *arguments)
        return await answer if inspect.isawaitable(answer) else answer


def _with_params(
    found: Any, target: str, params: Mapping[str, Any], leading: int
) -> Callable[..., Any]:
    if not callable(found):
        raise PipelineError(f"{target} is a {type(found).__qualname__}, which cannot be called.")
    converted = _converted(found, params, leading=leading)
    return functools.partial(found, **converted) if converted else found


def _converted(function: Any, params: Mapping[str, Any], *, leading: int) -> dict[str, Any]:
    """Convert parameters by the annotations of a function, without its leading ones."""
    taken = list(inspect.signature(function).parameters.values())

    def rest(**_: Any) -> None: ...

    rest.__signature__ = inspect.Signature(taken[leading:])  # type: ignore[attr-defined]
    rest.__wrapped__ = function  # type: ignore[attr-defined]
    return convert_parameters(rest, params)


def _is_async(call: Any) -> bool:
    call = call.func if isinstance(call, functools.partial) else call
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(
        getattr(call, "__call__", None)  # noqa: B004  # an object with an async __call__
    )


async def in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a thread of its own; cancelled, the thread is left to itself."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(method: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            method(value)

    def run() -> None:
        try:
            answer = call(*arguments)
        except BaseException as error:
            told: tuple[Callable[[Any], None], Any] = (future.set_exception, _raisable(error))
        else:
            told = (future.set_result, answer)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *told)

    threading.Thread(target=run, name="item", daemon=True).start()
    return await future


def _raisable(error: BaseException) -> BaseException:
    """Return what a future can hold: no StopIteration, nothing that ends the loop."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    wrapped = RuntimeError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


async def within(timeout_s: float | None, call: Any) -> Any:
    """Await a coroutine for so long; one that does not let itself be cancelled is left behind.

    Raises:
        TimeoutError: Time is up.
    """
    loop = asyncio.get_running_loop()
    task, ended = loop.create_task(_contained(call)), loop.create_future()

    def wake(_task: object = None) -> None:
        if not ended.done():
            ended.set_result(None)

    task.add_done_callback(wake)
    timer = None if timeout_s is None else loop.call_later(timeout_s, wake)
    try:
        await ended
    except asyncio.CancelledError:
        task.cancel()
        raise
    finally:
        if timer is not None:
            timer.cancel()
    if task.done():
        if task.cancelled():
            raise RuntimeError("the call cancelled itself")
        return task.result()
    task.cancel()
    await asyncio.wait({task}, timeout=_CANCEL_GRACE_S)
    task.add_done_callback(_look)
    raise TimeoutError(f"not done after {timeout_s:g} s")


async def _contained(call: Any) -> Any:
    try:
        return await call
    except (SystemExit, KeyboardInterrupt) as error:
        raise _raisable(error) from error


def _look(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()
