"""Task adapters: what a benchmark's data, models and metrics are. They know no method by name."""
