"""Drawing: one module per group of figures, one template (`figures.overlap`)."""
