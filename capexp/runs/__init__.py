"""Runs and groups of runs: open, train, evaluate and register them."""
