"""The GGUF format: one file for llama.cpp."""
