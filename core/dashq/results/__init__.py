"""Results, which a run leaves behind: the output folder, its report, and what is done with it later."""
