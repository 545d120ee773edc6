"""CoremlLowering of a graph to Core ML operators."""
