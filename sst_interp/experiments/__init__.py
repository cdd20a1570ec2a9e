"""What needs a model again: each experiment keeps one table, and goes on where it was stopped."""
