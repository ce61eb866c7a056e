"""The recipe, what is asked: its entries, its text, and its plan for a model."""
