"""Checks of a conversion: integers, constants, each step, logits and texts."""
