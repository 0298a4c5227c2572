"""Studies of real models: what they are, and where their weights and images come from."""
