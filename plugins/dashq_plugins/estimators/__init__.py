"""Default curvature estimators."""
