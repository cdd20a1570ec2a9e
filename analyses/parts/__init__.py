"""What the analyses are made of: measures shared by several, and the pieces of the larger ones."""
