"""Training: adapters and blend weights together, or the matched baseline.

`trainer.Training` is the entry point; `recipe.TrainingRecipe` says what is trained on what.
"""
