"""The model: its location, its blocks, and its mixtures of experts."""
