"""Studies: what looks at a model, times it or trains one; each is a command of its own."""
