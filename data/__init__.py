"""What ships with the package: run recipes, and later checkpoints and measured runs."""
