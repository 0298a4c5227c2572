"""Whole grids on an engine: a suite is read, its cells are planned, and run here or on a Ray cluster into one store."""
