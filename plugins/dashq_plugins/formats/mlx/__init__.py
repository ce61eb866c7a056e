"""The MLX format: files for mlx-lm."""
