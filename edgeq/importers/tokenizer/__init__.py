"""Tokenizer files: tokenizer.json, SentencePiece models and chat templates."""
