"""Faults on a real cluster, and a checker that knows nothing of the service's code."""
