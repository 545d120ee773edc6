"""Runs models: engine, kernels, sampling, tokenizer, chat templates, generation."""
