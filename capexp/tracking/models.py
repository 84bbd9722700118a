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
            _refuse_moved(model)
            uri = mlflow.get_registry_uri()
            reason = without_secrets(str(error).splitlines()[0], uri)
            raise InputError(
                f"--model {model}: not found in {shown_uri(uri)} ({reason}); `mlflow ui` lists them"
            ) from None
    bundle = model_folder / "artifacts" / "bundle"
    if not bundle.is_dir():
        _refuse_moved(model)
        raise InputError(f"--model {model}: not a captioner of this project (artifacts/bundle is missing)")
    return bundle


def _refuse_moved(model: str) -> None:
    """Raise InputError if the files of a model were on this machine, in a folder that is gone."""
    from capexp.tracking.store import moved_remedy

    gone = _missing_folder(model)
    if gone is not None:
        project = next((parent.parent for parent in gone.parents if parent.name == "mlruns"), gone)
        raise InputError(
            f"--model {model}: its files were in {gone}, which is gone; if the project's folder was moved, let its old "
            f"path lead to it: {moved_remedy(project)}"
        )


def _missing_folder(model: str) -> Path | None:
    """Return the folder on this machine that should hold a model's files, if it does not exist."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    from capexp.tracking.store import local_folder

    client = MlflowClient()
    scheme, _, rest = model.partition(":/")
    try:
        if scheme == "runs":
            location = str(client.get_run(rest.strip("/").partition("/")[0]).info.artifact_uri)
        else:
            name, _, alias = rest.strip("/").partition("@")
            if alias:
                number = str(client.get_model_version_by_alias(name, alias).version)
            else:
                name, _, number = name.rpartition("/")
            location = client.get_model_version_download_uri(name, number)
            if location.startswith("models:/"):
                location = str(client.get_logged_model(location.removeprefix("models:/")).artifact_location)
    except MlflowException:
        return None
    folder = local_folder(location)
    return folder if folder is not None and not folder.exists() else None
