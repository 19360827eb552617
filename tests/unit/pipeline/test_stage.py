"""Stages: what kind of callable each is, which options it carries, what is refused."""

import functools
import pickle
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

import hpcresume as hr
from hpcresume.errors import PipelineError
from hpcresume.pipeline.stage import FunctionStage, StageTraits, as_stage, snake_case


def plain(item: int) -> int:
    return item + 1


def generator(item: int) -> Iterator[int]:
    yield item


async def coroutine(item: int) -> int:
    return item


async def async_generator(item: int) -> AsyncIterator[int]:
    yield item


def with_context(item: int, ctx: hr.Context) -> int:
    return item + ctx.attempt


async def coroutine_with_context(item: int, ctx: hr.Context) -> int:
    return item + ctx.attempt


def scaled(item: int, factor: int) -> int:
    return item * factor


def closure() -> Any:
    bound = 3

    def inner(item: int) -> int:
        return item + bound

    return inner


class CallableObject:
    def __call__(self, item: int) -> Iterator[int]:
        yield item


class Methods:
    def bound(self, item: int, ctx: hr.Context) -> int:
        return item + ctx.attempt

    @classmethod
    async def of_class(cls, item: int) -> int:
        return item


class One(hr.Stage):
    def process(self, item: int) -> int:
        return item


class OneWithContext(hr.Stage):
    def process(self, item: int, ctx: hr.Context) -> int:
        return item + ctx.attempt


class OneAsync(hr.Stage):
    max_concurrency = 8

    async def process(self, item: int, ctx: hr.Context) -> int:
        return item + ctx.attempt


class OneGenerator(hr.Stage):
    def process(self, item: int) -> Iterator[int]:
        yield item


class Batch(hr.Stage):
    batch_size = 4

    def process_batch(self, items: Sequence[int]) -> Sequence[int]:
        return items


class BatchAsync(hr.Stage):
    async def process_batch(
        self, items: Sequence[int], contexts: Sequence[hr.Context]
    ) -> Sequence[int]:
        return [i + c.attempt for i, c in zip(items, contexts, strict=True)]


TRAITS = ("is_async", "is_batch", "is_generator", "is_async_generator", "wants_context")


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        pytest.param(plain, set(), id="function"),
        pytest.param(generator, {"is_generator"}, id="generator"),
        pytest.param(coroutine, {"is_async"}, id="coroutine"),
        pytest.param(async_generator, {"is_async", "is_async_generator"}, id="async generator"),
        pytest.param(with_context, {"wants_context"}, id="context"),
        pytest.param(coroutine_with_context, {"is_async", "wants_context"}, id="async context"),
        pytest.param(functools.partial(scaled, factor=2), set(), id="partial"),
        pytest.param(functools.partial(generator), {"is_generator"}, id="partial of generator"),
        pytest.param(
            functools.partial(functools.partial(coroutine)), {"is_async"}, id="partial of partial"
        ),
        pytest.param(lambda item: item, set(), id="lambda"),
        pytest.param(lambda item, factor=2: item * factor, set(), id="value bound by default"),
        pytest.param(lambda item, ctx=None: (item, ctx), {"wants_context"}, id="optional ctx"),
        pytest.param(closure(), set(), id="closure"),
        pytest.param(CallableObject(), {"is_generator"}, id="object with __call__"),
        pytest.param(Methods().bound, {"wants_context"}, id="bound method"),
        pytest.param(Methods.of_class, {"is_async"}, id="class method"),
        pytest.param(len, set(), id="builtin"),
        pytest.param(str, set(), id="type"),
        pytest.param(lambda *items: items, set(), id="any positional"),
        pytest.param(One, set(), id="Stage class"),
        pytest.param(One(), set(), id="Stage"),
        pytest.param(OneWithContext(), {"wants_context"}, id="Stage with context"),
        pytest.param(OneAsync(), {"is_async", "wants_context"}, id="async Stage"),
        pytest.param(OneGenerator(), {"is_generator"}, id="generator Stage"),
        pytest.param(Batch(), {"is_batch"}, id="batch Stage"),
        pytest.param(BatchAsync(), {"is_async", "is_batch", "wants_context"}, id="async batch"),
    ],
)
def test_traits_tell_what_kind_of_callable_a_stage_is(obj: Any, expected: set[str]) -> None:
    """Every kind of callable is recognised before it is called the first time."""
    assert StageTraits(**{t: t in expected for t in TRAITS}) == as_stage(obj).traits


def test_decorator_returns_the_function_itself() -> None:
    """A decorated stage is the function, so that a test simply calls it."""

    def double(item: int) -> int:
        return 2 * item

    assert double is hr.stage(double)
    assert double is hr.stage(name="twice", cpus=2)(double)
    assert 42 == double(21)


def test_options_of_the_decorator_reach_the_stage() -> None:
    """What @stage was given is what the stage has; the rest keeps its default."""

    @hr.stage(name="fetch", cpus=0.5, workers=3, max_concurrency=32, timeout_s=60)
    async def annotate(item: int) -> int:
        return item

    made = as_stage(annotate)

    assert ("fetch", 0.5, 0, 3, 32, 60, 600) == (
        made.name,
        made.cpus,
        made.gpus,
        made.workers,
        made.max_concurrency,
        made.timeout_s,
        made.setup_timeout_s,
    )


def test_options_survive_a_partial() -> None:
    """A partial of a decorated function is a stage with the function's name and options."""
    decorated = hr.stage(cpus=4)(lambda item, factor: item * factor)
    made = as_stage(functools.partial(decorated, factor=3))

    assert ("lambda", 4, 21) == (made.name, made.cpus, made.process(7))


def test_options_survive_a_wrapper() -> None:
    """A wrapper made with functools.wraps keeps the options."""

    @hr.stage(gpus=1)
    def inner(item: int) -> int:
        return item

    @functools.wraps(inner)
    def wrapper(item: int) -> int:
        return inner(item)

    assert ("inner", 1) == (as_stage(wrapper).name, as_stage(wrapper).gpus)


@pytest.mark.parametrize(
    ("obj", "name"),
    [
        (plain, "plain"),
        (lambda item: item, "lambda"),
        (functools.partial(scaled, factor=2), "scaled"),
        (closure(), "inner"),
        (CallableObject(), "callable_object"),
        (Methods().bound, "bound"),
        (OneWithContext, "one_with_context"),
    ],
)
def test_a_stage_is_named_after_what_it_is_made_of(obj: Any, name: str) -> None:
    """Without a name of its own a stage has that of its function or class."""
    assert name == as_stage(obj).name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Embed", "embed"),
        ("ParsePage", "parse_page"),
        ("ParseHTMLPage", "parse_html_page"),
        ("GPT2Embed", "gpt2_embed"),
    ],
)
def test_class_names_become_snake_case(name: str, expected: str) -> None:
    """A class's default name reads like a function's."""
    assert expected == snake_case(name)


def test_a_class_may_name_itself_and_its_instances() -> None:
    """A name on the class or the instance stands before the default."""

    class Named(One):
        name = "chosen"

    class Parametrised(One):
        def __init__(self, language: str) -> None:
            self.name = f"filter-{language}"

    assert ["chosen", "filter-en"] == [as_stage(s).name for s in (Named, Parametrised("en"))]


def test_a_frozen_dataclass_may_be_a_stage() -> None:
    """Nothing has to be assigned to a stage to use it."""

    @dataclass(frozen=True)
    class Scale(hr.Stage):
        factor: int

        def process(self, item: int) -> int:
            return item * self.factor

    assert not as_stage(Scale(2)).traits.is_async


def test_a_function_stage_survives_pickle() -> None:
    """A stage of a module's function travels to a worker by reference."""
    made = pickle.loads(pickle.dumps(as_stage(plain)))

    assert isinstance(made, FunctionStage)
    assert (plain, "plain", 2) == (made.function, made.name, made.process(1))


class Neither(hr.Stage):
    pass


class Both(One):
    def process_batch(self, items: Sequence[int]) -> Sequence[int]:
        return items


class BatchGenerator(hr.Stage):
    def process_batch(self, items: Sequence[int]) -> Iterator[int]:
        yield from items


class NeedsArguments(One):
    def __init__(self, model: str) -> None:
        self.model = model


class AsyncSetup(One):
    async def setup(self, worker: hr.Worker) -> None:
        del worker


class AsyncTeardown(One):
    async def teardown(self) -> None:
        pass


def _with(**options: Any) -> hr.Stage:
    made = One()
    for name, value in options.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        pytest.param(Neither, ["Neither", "neither"], id="neither method"),
        pytest.param(Both, ["Both", "both"], id="both methods"),
        pytest.param(BatchGenerator, ["batch_generator", "generator"], id="batch generator"),
        pytest.param(NeedsArguments, ["NeedsArguments", "model"], id="class with arguments"),
        pytest.param(AsyncSetup, ["async_setup", "def setup"], id="async setup"),
        pytest.param(AsyncTeardown, ["async_teardown", "def teardown"], id="async teardown"),
        pytest.param(42, ["42", "int"], id="not callable"),
        pytest.param(None, ["None"], id="none"),
        pytest.param(lambda: 1, ["lambda"], id="no parameter"),
        pytest.param(lambda a, b, c: (a, b, c), ["a, b, c"], id="three parameters"),
        pytest.param(lambda a, *, b: (a, b), ["partial"], id="required keyword"),
        pytest.param(_with(cpus=-1), ["cpus=-1"], id="negative cpus"),
        pytest.param(_with(cpus="2"), ["cpus='2'"], id="text for a number"),
        pytest.param(_with(gpus=float("nan")), ["gpus=nan"], id="nan"),
        pytest.param(_with(workers=0), ["workers=0"], id="no workers"),
        pytest.param(_with(workers=1.5), ["workers=1.5"], id="half a worker"),
        pytest.param(_with(timeout_s=0), ["timeout_s=0"], id="no time"),
        pytest.param(_with(timeout_s=True), ["timeout_s=True"], id="bool for a number"),
        pytest.param(_with(max_concurrency=2), ["async"], id="concurrency without async"),
        pytest.param(_with(batch_size=2), ["process_batch"], id="batches without process_batch"),
        pytest.param(_with(name="a/b"), ["'a/b'"], id="slash in name"),
        pytest.param(_with(name=""), ["''"], id="empty name"),
    ],
)
def test_what_cannot_be_a_stage_is_refused_by_name(obj: Any, words: list[str]) -> None:
    """The error says which stage, and what is wrong with it."""
    with pytest.raises(PipelineError) as caught:
        as_stage(obj)
    assert [] == [word for word in words if word not in str(caught.value)]


def test_unknown_options_are_refused_with_a_suggestion() -> None:
    """A misspelt option is an error where it is written."""
    with pytest.raises(PipelineError, match="Did you mean 'timeout_s'"):
        hr.stage(timeouts=3)  # type: ignore[call-overload]


def test_batch_size_of_a_function_is_refused() -> None:
    """Only a class takes batches; the error says so."""
    with pytest.raises(PipelineError, match="process_batch"):
        hr.stage(batch_size=3)  # type: ignore[call-overload]


@pytest.mark.parametrize("obj", [One, len, "text"])
def test_what_cannot_carry_options_is_refused(obj: Any) -> None:
    """A class has attributes instead, and a builtin needs a partial around it."""
    with pytest.raises(PipelineError):
        hr.stage(obj, cpus=2)


def test_sentinels_compare_and_survive_pickle() -> None:
    """Sentinels travel between processes unchanged."""
    for sentinel in (hr.Many([1, [2]]), hr.Failed("no", retry=False)):
        assert sentinel == pickle.loads(pickle.dumps(sentinel))
    broken = pickle.loads(pickle.dumps(hr.WorkerBroken("server died")))
    assert ("server died", "server died") == (broken.reason, str(broken))


def test_many_holds_the_items_of_any_iterable() -> None:
    """Many reads a generator once and is a sequence afterwards."""
    many = hr.Many(n * n for n in range(3))

    assert ((0, 1, 4), 3, [0, 1, 4], 4) == (many.items, len(many), list(many), many[2])
    assert () == hr.Many().items
