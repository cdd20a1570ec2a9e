"""Statistics on plain arrays, with questions as the unit: `bootstrap` and `permutation` first of all."""
