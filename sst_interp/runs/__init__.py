"""Captured runs: recipe, capture, what is measured, and the folder that holds it."""
