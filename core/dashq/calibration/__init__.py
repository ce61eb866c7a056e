"""Calibration: tokens on their way through the blocks, and what layers are given on it."""
