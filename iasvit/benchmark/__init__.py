"""The harness that measures cells, the store of its rows, and where each number comes from."""
