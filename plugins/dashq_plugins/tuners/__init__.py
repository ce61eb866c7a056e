"""Default tuners."""
