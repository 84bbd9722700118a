"""MLflow: runs, the registry and its champion, the served model, the report."""
