"""The measurements behind docs/results.md, each runnable by name: `python -m bench NAME`."""
