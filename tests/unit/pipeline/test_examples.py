"""The example runs on real files of the standard library, and its rows are right."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import hpcresume as hr
from hpcresume.examples import stdlib_functions as example
from hpcresume.pipeline.load import load_pipeline, parse_target

SOURCE = '''
def top(a, b=1, *rest, key, **others):
    """Documented."""
    if a and b or key:
        return [x for x in rest if x]
    def inner():
        pass

class Public:
    def method(self):
        try:
            pass
        except ValueError:
            pass
    async def _private(self): ...

class _Hidden:
    def method(self): ...

if True:
    def conditional(): ...
'''


def rows_of(path: Path, tmp_path: Path) -> list[dict[str, Any]]:
    context = hr.Context(
        source_id=path.name,
        item_id=path.name,
        attempt=1,
        seed=1,
        scratch_root=tmp_path,
        outputs_root=None,
        seconds_left=lambda: None,
    )
    items = map(example.public, example.functions(example.parse(path)))
    return [example.measure(item, context) for item in items if item is not None]


def test_rows_measure_the_public_functions(tmp_path: Path) -> None:
    """Private names are dropped at every level; size, branches and arguments are counted."""
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    rows = rows_of(path, tmp_path)

    assert ["top", "top.inner", "Public.method", "conditional"] == [
        row["qualified_name"] for row in rows
    ]
    assert {
        "file": "module.py",
        "name": "top",
        "qualified_name": "top",
        "line": 2,
        "lines": 6,
        "complexity": 5,
        "arguments": 5,
        "has_docstring": True,
    } == rows[0]
    assert rows == json.loads(json.dumps(rows))


def test_files_that_do_not_parse_raise(tmp_path: Path) -> None:
    """A bad file fails, with its name, rather than giving no rows."""
    path = tmp_path / "bad.py"
    path.write_text("print 'hello'\n")
    with pytest.raises(SyntaxError) as caught:
        example.parse(path)
    assert str(path) == caught.value.filename


def test_invalid_escapes_do_not_warn(tmp_path: Path) -> None:
    """Warnings of the files read are not those of the pipeline."""
    path = tmp_path / "escape.py"
    path.write_text('x = "\\d"\n')
    assert 1 == len(example.parse(path).body)


def test_real_files_give_rows_and_travel_between_workers(tmp_path: Path) -> None:
    """Modules of the running Python: json's public functions are found, items pickle."""
    directory = Path(json.__file__).parent
    names = {row["qualified_name"] for row in rows_of(directory / "__init__.py", tmp_path)}
    tree = pickle.loads(pickle.dumps(example.parse(directory / "decoder.py")))

    assert {"dump", "dumps", "load", "loads", "detect_encoding"} == names
    assert list(example.functions(example.parse(directory / "decoder.py"))) == list(
        example.functions(tree)
    )


def test_the_pipeline_is_found_by_its_module() -> None:
    """It lists the standard library without what is installed into it."""
    spec = parse_target("hpcresume.examples.stdlib_functions", Path.cwd())
    pipeline = load_pipeline(spec, {}).pipeline
    listed = [source.id for source in pipeline.sources]

    assert ("stdlib_functions", 0.02) == (pipeline.name, pipeline.tolerate)
    assert ["parse", "functions", "public", "measure"] == [s.name for s in pipeline.stages]
    assert "json/decoder.py" in listed
    assert [] == [i for i in listed if "site-packages" in i or "dist-packages" in i]
