"""The model, of which it is asked: where it lies, its blocks, and its mixtures of experts."""
