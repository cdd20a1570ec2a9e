"""Real parts, pinned: wheels from the package index, and the model inside."""
