"""MLflow: its store, runs and their journals, the model registry and its champion, the served model."""
