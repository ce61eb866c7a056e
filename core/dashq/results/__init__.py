"""The result that a run leaves behind: the output folder, its report, and later uses of both."""
