"""Prune the few-shot examples of a LangChain chain, with proof on your own queries."""
