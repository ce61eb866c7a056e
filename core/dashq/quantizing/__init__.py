"""The work of a run: a model is opened and planned, and its blocks and layers are quantized one after the other."""
