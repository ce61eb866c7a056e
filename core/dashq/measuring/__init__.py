"""Measuring, which tells the cost of a layer to the model: sensitivities, budgets and evaluation."""
