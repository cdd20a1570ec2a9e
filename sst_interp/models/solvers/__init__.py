"""How the states of given tokens are found: position by position, layer by layer, or by sweeps."""
