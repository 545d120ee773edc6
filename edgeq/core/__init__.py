"""Errors, files, memory, processor and caches: what every other package stands on."""
