"""Default solvers."""
