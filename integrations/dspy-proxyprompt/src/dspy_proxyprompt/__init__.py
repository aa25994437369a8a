"""Prune the demos of a compiled DSPy program, with proof on your own queries."""
