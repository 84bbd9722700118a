"""The Optuna study: its space, where it is kept, its trials, and what comes out of it."""
