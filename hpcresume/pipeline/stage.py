"""Stages: a plain function, or a class where set-up is costly.

``@stage`` returns the function itself, so that a stage is tested by calling it.
Everything that the engine wants to know of a callable is in :class:`StageTraits`,
computed once when the pipeline is built.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, cast, overload

import msgspec

from hpcresume.errors import PipelineError

if TYPE_CHECKING:
    from hpcresume.pipeline.context import Worker

OPTIONS_ATTRIBUTE = "__hpcresume_options__"
OPTION_NAMES = (
    "cpus",
    "gpus",
    "workers",
    "max_concurrency",
    "timeout_s",
    "setup_timeout_s",
    "batch_size",
    "is_resumable",
)
_FUNCTION_OPTIONS = ("name", *(name for name in OPTION_NAMES if name != "batch_size"))
_CONTEXT_NAMES = frozenset({"ctx", "context", "contexts"})
_NAME = re.compile(r"[^\s/]+")

F = TypeVar("F", bound=Callable[..., Any])


def snake_case(name: str) -> str:
    """Return ``ParseHTMLPage`` as ``parse_html_page``."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return spaced.lower()


class StageOptions(TypedDict, total=False):
    """Options of :func:`stage`; the meanings are those of :class:`Stage`'s attributes."""

    name: str
    cpus: float
    gpus: float
    workers: int | None
    max_concurrency: int
    timeout_s: float | None
    setup_timeout_s: float
    is_resumable: bool


class StageTraits(msgspec.Struct, frozen=True):
    """What kind of callable a stage is.

    Attributes:
        is_async: A coroutine function or an async generator.
        is_batch: ``process_batch`` is what to call, slot i answers item i.
        is_generator: A synchronous generator function.
        is_async_generator: An asynchronous generator function.
        wants_context: It takes a second positional argument.
    """

    is_async: bool
    is_batch: bool
    is_generator: bool
    is_async_generator: bool
    wants_context: bool


class Stage:
    """A step of a pipeline with state: a model, a GPU, a local server.

    Override ``process(item[, ctx])`` or ``process_batch(items[, contexts])``, not both;
    either may be async.  ``ctx`` is a :class:`Context`, and ``contexts`` a list of them.
    Around all items of a worker come :meth:`setup` and :meth:`teardown`, which are not async.

    Attributes:
        name: Default: the class's name in snake_case.
        cpus: Cores that one worker of this stage holds.
        gpus: GPUs that one worker of this stage holds.
        workers: Number of workers per array task; None: as many as the resources allow.
        max_concurrency: Items in flight in one worker; async stages only.
        timeout_s: Seconds for one item or one batch; None: no limit.
        setup_timeout_s: Seconds for :meth:`setup`.
        batch_size: Items given to one ``process_batch``.
        is_resumable: False when an output belongs to no single source (shuffle, global
            dedup, aggregation); a pipeline with such a stage is refused.
    """

    name: str = "stage"
    cpus: float = 1
    gpus: float = 0
    workers: int | None = None
    max_concurrency: int = 1
    timeout_s: float | None = None
    setup_timeout_s: float = 600
    batch_size: int = 1
    is_resumable: bool = True

    # Declared without a value: a subclass may narrow the signature as it likes, and
    # which one it has is how the two kinds of stage are told apart.
    process: Callable[..., Any]
    process_batch: Callable[..., Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = snake_case(cls.__name__)

    # Whatever a subclass calls its parameter, it is the same to who calls it.
    def setup(self, worker: Worker, /) -> None:
        """Prepare this worker, once, before its first item: load a model, start a server.

        What it raises, or more than ``setup_timeout_s``, keeps the worker from starting, and
        no source is charged.

        Args:
            worker: The process that this instance lives in: its number, cores, GPUs and a
                directory; what ``worker.spawn`` starts ends with it.
        """

    def teardown(self) -> None:
        """Release what :meth:`setup` took; called when the worker ends in order.

        What it raises is logged, and changes nothing: what was computed is safe by then.
        """

    @functools.cached_property
    def traits(self) -> StageTraits:
        """What kind of callable this stage is.

        Raises:
            PipelineError: Neither or both of ``process`` and ``process_batch`` are there,
                or the one that is cannot be called with an item.
        """
        one = getattr(self, "process", None)
        batch = getattr(self, "process_batch", None)
        if (one is None) == (batch is None):
            found = "neither" if one is None else "both"
            raise PipelineError(
                f"stage {self.name!r} ({type(self).__qualname__}) has {found} of process and "
                "process_batch. A stage answers items one by one or in batches. "
                "Override exactly one of the two.",
                stage=self.name,
            )
        return _traits(one or batch, self.name, is_batch=batch is not None)

    @property
    def options(self) -> dict[str, Any]:
        """The options as JSON values, without the name."""
        return {name: getattr(self, name) for name in OPTION_NAMES}


class FunctionStage(Stage):
    """A function, partial, lambda, closure or other callable as a stage.

    Attributes:
        function: The callable itself.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = self.process = function
        self.name = _callable_name(function)
        for option, value in _attached_options(function).items():
            setattr(self, option, value)


@overload
def stage(fn: F, /, **options: Unpack[StageOptions]) -> F: ...
@overload
def stage(fn: None = None, /, **options: Unpack[StageOptions]) -> Callable[[F], F]: ...
def stage(fn: F | None = None, /, **options: Unpack[StageOptions]) -> F | Callable[[F], F]:
    """Mark a function as a stage and attach options to it.

    Args:
        fn: One item in; a value, a generator of values, ``None``, :class:`Many` or
            :class:`Failed` out.  May be async.
        **options: Attributes of :class:`Stage` (``name``, ``cpus``, ``timeout_s``, ...).

    Returns:
        The function itself, still callable as before.

    Raises:
        PipelineError: An option is unknown, or ``fn`` cannot carry options.
    """
    given = dict(cast("Mapping[str, Any]", options))
    _refuse_unknown_options(given)
    if fn is None:
        return lambda function: _attach(function, given)
    return _attach(fn, given)


def as_stage(obj: object) -> Stage:
    """Return ``obj`` as a stage whose options and traits are checked.

    Args:
        obj: A :class:`Stage`, a subclass of it that needs no arguments, or a callable.

    Raises:
        PipelineError: It is none of these, or an option cannot be right.
    """
    if isinstance(obj, Stage):
        made = obj
    elif isinstance(obj, type) and issubclass(obj, Stage):
        made = _instantiate(obj)
    elif callable(obj):
        made = FunctionStage(obj)
    else:
        raise PipelineError(
            f"a stage is {obj!r} ({type(obj).__qualname__}), which cannot be called. "
            "A stage is a function, a Stage, or another callable. "
            "Give the function itself: `parse`, not `parse()`."
        )
    _check_options(made)
    return made


def _instantiate(cls: type[Stage]) -> Stage:
    try:
        return cls()
    except TypeError as error:
        raise PipelineError(
            f"stage {cls.__qualname__} is a class that cannot be made without arguments: {error}. "
            "A pipeline needs the stage itself. "
            f"Give an instance: stages=[..., {cls.__name__}(...)]."
        ) from error


def _attach(fn: F, options: dict[str, Any]) -> F:
    if isinstance(fn, type) or not callable(fn):
        raise PipelineError(
            f"@stage was given {fn!r}, which is not a function. "
            "The options of a Stage class are its class attributes (cpus = 4). "
            "Remove the decorator."
        )
    try:
        setattr(fn, OPTIONS_ATTRIBUTE, {**_attached_options(fn), **options})
    except AttributeError as error:
        raise PipelineError(
            f"@stage cannot attach options to {fn!r}: its type takes no attributes. "
            "Wrap it: stage(functools.partial(...), ...)."
        ) from error
    return fn


def _attached_options(fn: object) -> dict[str, Any]:
    options = getattr(fn, OPTIONS_ATTRIBUTE, None)
    if options is None and isinstance(fn, functools.partial):
        return _attached_options(fn.func)
    return dict(options or {})


def _refuse_unknown_options(options: Mapping[str, Any]) -> None:
    for option in options:
        if option in _FUNCTION_OPTIONS:
            continue
        if option == "batch_size":
            hint = "Batches need a class: derive from Stage and override process_batch."
        else:
            near = difflib.get_close_matches(option, _FUNCTION_OPTIONS, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            hint += f"Options are: {', '.join(_FUNCTION_OPTIONS)}."
        raise PipelineError(f"@stage has no option {option!r}. {hint}", option=option)


def _callable_name(fn: object) -> str:
    if isinstance(fn, functools.partial):
        return _callable_name(fn.func)
    name = getattr(fn, "__name__", None)
    if name is None:
        return snake_case(type(fn).__name__)
    return "lambda" if name == "<lambda>" else str(name)


def _traits(function: Any, name: str, *, is_batch: bool) -> StageTraits:
    kind = _code_of(function)
    is_async_generator = inspect.isasyncgenfunction(kind)
    is_generator = inspect.isgeneratorfunction(kind)
    if is_batch and (is_generator or is_async_generator):
        raise PipelineError(
            f"stage {name!r}: process_batch is a generator. "
            "It has to return a sequence whose slot i answers item i. "
            "Return a list, with Many([...]) in a slot that fans out.",
            stage=name,
        )
    return StageTraits(
        is_async=is_async_generator or inspect.iscoroutinefunction(kind),
        is_batch=is_batch,
        is_generator=is_generator,
        is_async_generator=is_async_generator,
        wants_context=_wants_context(function, name),
    )


def _code_of(function: Any) -> Any:
    """Return the function whose code flags tell what a call returns."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function) or isinstance(function, type):
        return function
    return getattr(function, "__call__", function)  # noqa: B004  # its method is inspected


def _wants_context(function: Any, name: str) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin that tells nothing takes the item only
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    needed_keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(required) > 2 or needed_keywords or not (positional or takes_any):
        raise PipelineError(
            f"stage {name!r} cannot be called with an item: its parameters are "
            f"({', '.join(map(str, parameters))}). "
            "A stage takes the item, and a context if it has a second parameter. "
            "Bind the others with functools.partial(..., name=value).",
            stage=name,
        )
    return len(positional) >= 2 and _is_context(positional[1])


def _is_context(parameter: inspect.Parameter) -> bool:
    # `lambda item, k=k: ...` binds a value by default; such a parameter is no context.
    return parameter.default is parameter.empty or parameter.name in _CONTEXT_NAMES


def _check_options(stage: Stage) -> None:
    if not (isinstance(stage.name, str) and _NAME.fullmatch(stage.name)):
        raise PipelineError(
            f"a stage is named {stage.name!r}. Stage names are parts of item ids. "
            "Give it a name without blanks and slashes.",
            stage=str(stage.name),
        )
    traits = stage.traits
    _refuse_coroutines(stage)
    _check_number(stage, "cpus", minimum=0)
    _check_number(stage, "gpus", minimum=0)
    _check_number(stage, "setup_timeout_s", above=0)
    _check_number(stage, "max_concurrency", minimum=1, whole=True)
    _check_number(stage, "batch_size", minimum=1, whole=True)
    if stage.workers is not None:
        _check_number(stage, "workers", minimum=1, whole=True)
    if stage.timeout_s is not None:
        _check_number(stage, "timeout_s", above=0)
    if stage.max_concurrency > 1 and not traits.is_async:
        _refuse_option(stage, "max_concurrency", "only an async stage has several items in flight")
    if stage.batch_size > 1 and not traits.is_batch:
        _refuse_option(stage, "batch_size", "only process_batch takes batches")


def _refuse_coroutines(stage: Stage) -> None:
    for hook in ("setup", "teardown"):
        if inspect.iscoroutinefunction(getattr(stage, hook)):
            raise PipelineError(
                f"stage {stage.name!r}: {hook} is async, and nobody would await it. "
                f"It is called around all items of a worker, not beside them. Write `def {hook}`; "
                "what has to be awaited is made by the first process() that needs it.",
                stage=stage.name,
            )


def _check_number(
    stage: Stage,
    option: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    whole: bool = False,
) -> None:
    value = getattr(stage, option)
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        _refuse_option(stage, option, f"it takes {'an integer' if whole else 'a number'}")
    if minimum is not None and value < minimum:
        _refuse_option(stage, option, f"the least is {minimum:g}")
    if above is not None and value <= above:
        _refuse_option(stage, option, f"it has to be above {above:g}")


def _refuse_option(stage: Stage, option: str, why: str) -> None:
    value = getattr(stage, option)
    raise PipelineError(
        f"stage {stage.name!r}: {option}={value!r} cannot be right: {why}.",
        stage=stage.name,
        option=option,
    )
