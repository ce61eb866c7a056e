"""The command line as `python -m dashq`, the form that torchrun starts."""

from dashq_cli import main

main()
