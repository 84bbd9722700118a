"""Find the bundle that ``--model`` names; MLflow is imported only where it has to be asked."""

from pathlib import Path

from capexp.errors import InputError, shown_uri, without_secrets


def find_bundle(model: str) -> Path:
    """Return the bundle of a model: a folder, ``runs:/ID/captioner``, ``models:/NAME/VERSION`` or ``@champion``."""
    if not model.startswith(("runs:/", "models:/")):
        folder = Path(model)
        if not folder.is_dir():
            raise InputError(
                f"--model {model}: neither a bundle's folder nor runs:/ID/captioner nor models:/NAME@champion"
            )
        return folder
    import mlflow
    from mlflow.exceptions import MlflowException

    from capexp.tracking.store import require_store, store_faults

    require_store()
    with store_faults():
        try:
            local = Path(mlflow.artifacts.download_artifacts(model))
        except (MlflowException, OSError) as error:
            uri = mlflow.get_registry_uri()
            reason = without_secrets(str(error).splitlines()[0], uri)
            raise InputError(
                f"--model {model}: not found in {shown_uri(uri)} ({reason}); `mlflow ui` lists them"
            ) from None
    bundle = local / "artifacts" / "bundle"
    if not bundle.is_dir():
        raise InputError(f"--model {model}: not a captioner of this project (artifacts/bundle is missing)")
    return bundle
