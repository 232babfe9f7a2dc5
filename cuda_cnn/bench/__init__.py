"""Benchmarks: the layers of the networks, a timer, and every operator beside torch's."""
