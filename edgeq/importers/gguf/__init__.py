"""Decoders from GGUF files."""
