"""`python -m bench NAME …`: run one measurement by name; `python -m bench` lists them."""

import importlib
import pkgutil
import sys

import bench

names = sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if not module.name.startswith("_"))
if len(sys.argv) < 2 or sys.argv[1] not in names:
    sys.exit(f"usage: python -m bench NAME [--help]; NAME is one of: {', '.join(names)}")
del sys.argv[0]
importlib.import_module(f"bench.{sys.argv[0]}").main()
