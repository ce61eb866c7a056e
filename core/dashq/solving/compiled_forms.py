"""Compiled forms that stay on disk, so that a later process need not trace the same arithmetic again."""

import functools
import hashlib
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Options = dict[str, str | int | bool | Callable[..., Any]]

# Of one function: arguments of more kinds than these are left to torch, which in the end gives compiling up.
MOST_FORMS = 16


class CompiledForms:
    """The compiled forms of one function: each serves all arguments that pass its guards, whatever their shapes.

    They lie where torch keeps what it compiles, in a folder for these options, this processor, the versions of torch
    and Python, and the source of dashq and of the function's package. Kept are those for processors, of functions that
    a package's module defines: what an inner function or a lambda means does not follow from its name and the source.
    """

    def __init__(self, function: Callable[..., Any], options: Options) -> None:
        """Load the forms that there are; torch 2.10 and later can."""
        self._function, self._options = function, options
        self._forms: list[Any] = []  # torch's `AOTCompiledFunction`
        self._unkept: Callable[..., Any] | None = None
        self._keeps = hasattr(torch.compiler, "load_compiled_function") and _is_in_a_package(function)
        if self._keeps:
            for file in takewhile(Path.exists, self._files()):
                self._load(file)

    def fitting(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
        """The form for these arguments: one that is there, or one that is compiled for them now."""
        for number, form in enumerate(self._forms):
            if form.guard_check(*args, **kwargs):
                # Asked first the next time: a call is mostly followed by others of its kind.
                self._forms.insert(0, self._forms.pop(number))
                fitting: Callable[..., Any] = form
                return fitting
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if self._keeps and len(self._forms) < MOST_FORMS and all(tensor.is_cpu for tensor in tensors):
            with suppress(Exception):  # arithmetic that torch can only compile in several parts, say
                return self._compile(args, kwargs)
        # torch's own, which has guards and forms of its own.
        self._keeps = False
        self._unkept = self._unkept or torch.compile(self._function, dynamic=True, options=self._options)
        return self._unkept

    def _compile(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
        """A new form, which is kept where it can be saved: not if the folder cannot be written to, say."""
        from torch._dynamo import config as dynamo  # slow to import

        shapes: Any = import_module("torch.fx.experimental._config")
        whole: Any = torch.compile(self._function, dynamic=True, fullgraph=True, options=self._options)
        # Sizes that are equal now need not be so later; and numbers in the source are constants.
        with shapes.patch(use_duck_shape=False), dynamo.patch(specialize_float=True):
            form: Any = whole.aot_compile((args, kwargs))
        file = next(file for file in self._files() if not file.exists())
        with suppress(Exception):
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f"{file.name}.{os.getpid()}")
            form.save_compiled_function(str(part))
            part.replace(file)  # whole or not at all: another process may read it now
        return self._take_in(form)

    def _load(self, file: Path) -> None:
        """Take in a form from its file; one that torch cannot read is left aside, and will be compiled anew."""
        from torch._inductor import config as inductor  # slow to import

        # The options tell how the C++ of a form is compiled, which torch may do anew when it is loaded.
        with suppress(Exception), file.open("rb") as stored, inductor.patch(self._options):
            self._take_in(torch.compiler.load_compiled_function(stored, f_globals=self._function.__globals__))

    def _take_in(self, form: Any) -> Callable[..., Any]:
        form.disable_guard_check()  # `fitting` checks
        self._forms.append(form)
        taken: Callable[..., Any] = form
        return taken

    def _files(self) -> Iterator[Path]:
        """The files of this function's forms, in the order in which they are compiled."""
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # slow to import

        function = self._function
        made_for = (
            sorted((name, repr(value)) for name, value in self._options.items()),
            torch.backends.cpu.get_cpu_capability(),
            torch.__version__,
            platform.python_version(),
            _source("dashq"),
            _source(_package(function)),
        )
        folder = Path(cache_dir()) / "dashq" / hashlib.sha256(repr(made_for).encode()).hexdigest()[:32]
        for number in count():
            yield folder / f"{function.__module__}.{function.__qualname__}.{number}"


def _is_in_a_package(function: Callable[..., Any]) -> bool:
    """True where a module of a package defines the function, which its name and the package's source then determine."""
    return function.__qualname__.isidentifier() and hasattr(sys.modules.get(_package(function)), "__path__")


def _package(function: Callable[..., Any]) -> str:
    return function.__module__.partition(".")[0]


@functools.cache
def _source(package: str) -> str:
    """A digest of a package's source: constants of other modules are parts of a form, too."""
    digest = hashlib.sha256()
    for folder in import_module(package).__path__:
        for file in sorted(Path(folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
