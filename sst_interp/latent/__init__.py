"""What the training schedules of a Latent Recurrent Transformer are worth.

`equivalence.compare_schedules` measures how far each is from sequential unrolling, in states, loss and
gradients; `schedules.run_schedules` trains a small model with each.
"""
