"""Compose quantization strategies into a run, and open the results with transformers."""

import importlib

import lazy_loader
import wrapt

# `__init__.pyi` says where each public name lies. It is imported when it is first used: most need torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@wrapt.when_imported("transformers.quantizers.auto")
def _register(module: object) -> None:
    """Let transformers open results, as soon as it can open anything."""
    importlib.import_module("dashq.runtime.quantizer")
