"""The collector of garbage rests inside, and works again afterwards."""

import gc

import pytest

from dashq_cli.imports import resting_collector


def test_no_garbage_is_collected_while_libraries_are_imported() -> None:
    gc.enable()
    with resting_collector():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_works_again_where_an_import_fails() -> None:
    with pytest.raises(ImportError, match="no_such_module"), resting_collector():
        raise ImportError("no_such_module")
    assert gc.isenabled()
