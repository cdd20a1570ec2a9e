"""Statistics on plain arrays, with questions as the unit: `resampling` and `permutation` first of all."""
