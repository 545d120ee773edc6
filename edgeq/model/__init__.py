"""A decoder: its configuration, its tensors, what it computes, and the file it is saved in."""
