"""Measurements of what quantization costs a model: sensitivities, budgets and evaluation."""
