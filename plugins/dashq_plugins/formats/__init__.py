"""Default formats, and what only formats share."""
