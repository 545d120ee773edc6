"""Lowering of a graph to LiteRT operators."""
