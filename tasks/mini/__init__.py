"""The embedded benchmark: procedurally drawn scenes and small models that keep the paper backbones' layout."""
