"""TfliteLowering of a graph to LiteRT operators."""
