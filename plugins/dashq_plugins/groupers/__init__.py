"""Default groupers."""
