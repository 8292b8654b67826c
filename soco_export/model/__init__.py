"""The dense model: which recipe it means, where it lies, how it is read."""
