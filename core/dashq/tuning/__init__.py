"""The tuner's engine: scales, offsets and norms of a quantized model change by gradients, and codes stay."""
