"""Calibration, in which layers are observed: tokens on their way through the blocks."""
