"""Find the bundle that ``--model`` names. MLflow is imported only if the bundle is in its store."""

from pathlib import Path

from capexp.errors import InputError, shown_uri, without_secrets


def find_bundle(model: str) -> Path:
    """Return the folder of a model's bundle, downloaded if necessary.

    ``model`` is a bundle's folder, ``runs:/ID/captioner``, ``models:/NAME/VERSION`` or ``models:/NAME@champion``.
    """
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
            model_folder = Path(mlflow.artifacts.download_artifacts(model))
        except (MlflowException, OSError) as error:
            uri = mlflow.get_registry_uri()
            reason = without_secrets(str(error).splitlines()[0], uri)
            raise InputError(
                f"--model {model}: not found in {shown_uri(uri)} ({reason}); `mlflow ui` lists them"
            ) from None
    bundle = model_folder / "artifacts" / "bundle"
    if not bundle.is_dir():
        raise InputError(f"--model {model}: not a captioner of this project (artifacts/bundle is missing)")
    return bundle
