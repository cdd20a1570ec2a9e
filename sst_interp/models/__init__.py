"""A language model with a state stream: backbone, kinds of stream, solvers, generation, checkpoints."""
