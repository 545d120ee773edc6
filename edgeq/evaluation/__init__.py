"""How good a model is: perplexity and divergence on text, tasks, and metrics of graphs."""
