"""The package's public names and what importing it costs."""

import subprocess
import sys

import pytest

import hpcresume as hr


def test_every_public_name_is_there() -> None:
    """__all__ is sorted, and each name in it can be had."""
    assert sorted(hr.__all__) == list(hr.__all__)
    assert set(hr.__all__) <= set(dir(hr))
    assert [] == [name for name in hr.__all__ if getattr(hr, name, None) is None]


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A lazy package still tells what it does not have."""
    with pytest.raises(AttributeError, match="no_such_name"):
        hr.no_such_name  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Neither the package nor its pipeline room needs Ray, LMDB or Arrow."""
    code = (
        "import sys, hpcresume, hpcresume.pipeline.load;"
        "print(sorted({'ray','lmdb','pyarrow','submitit','rich','numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "[]\n" == done.stdout
