"""Error feedback under the full curvature, and the descent that follows it."""
