"""Decoders from Hugging Face folders."""
