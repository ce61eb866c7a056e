"""Calibration: tokens on their way through the blocks, and the inputs that layers are given."""
