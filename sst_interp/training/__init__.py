"""Training: adapters and blend weights together, or the matched baseline.

`trainer.Training` is the entry point; `recipe.TrainingRecipe` holds all settings.
"""
