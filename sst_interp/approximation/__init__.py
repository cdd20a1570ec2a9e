"""How good the training's approximation is: errors of sweeps on real text, and a study of small models.

`named.errors_by_name` and `errors.measure_errors` measure the first, `study.run_study` the second.
"""
