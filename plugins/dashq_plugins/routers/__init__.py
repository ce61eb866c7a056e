"""Default routers."""
