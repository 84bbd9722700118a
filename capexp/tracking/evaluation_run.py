"""Log the evaluation of a captioner as a run of its own, linked to the evaluated model and to the split.

A finished training run is not written to. On the page of a registered version, MLflow shows the metrics of all runs
that are linked to its model.
"""

import json
import time
from collections.abc import Mapping

import mlflow
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, LoggedModelInput, Metric
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from capexp.tracking.known_runs import adopted_run
from capexp.tracking.registry import model_id_of
from capexp.tracking.run import Input, as_dataset
from capexp.tracking.store import check_store, prepare_store, store_faults

_LOSSES = {"cross_entropy": "loss", "cross_entropy_blind": "loss_blind"}
_NOT_LOGGED = ("targets", "photos", "captions_per_second")  # numbers that are not scores


def log_evaluation(scores: Mapping[str, object], split: Input) -> str:
    """Log the record of an evaluation to a new run, or to the adopted one under ``mlflow run``; return the run's id.

    The scores become metrics whose names start with the split's (``test_loss``, ``test_cider``). The decoding settings
    become params, and the whole record becomes the artifact ``scores.json``.
    """
    check_store(str(scores["experiment"]), adopted_run())
    prepare_store()
    model, name = str(scores["model"]), str(scores["split"])
    values = {
        f"{name}_{_LOSSES.get(key, key)}": float(value)
        for key, value in scores.items()
        if isinstance(value, int | float) and key not in _NOT_LOGGED
    }
    decoding = scores["decoding"]
    assert isinstance(decoding, Mapping)
    params = {"model": model, "split": name, "experiment": str(scores["experiment"])}
    params |= {f"decoding.{key}": str(value) for key, value in decoding.items()}
    client = MlflowClient()
    with store_faults():
        if adopted_run() is None:
            mlflow.set_experiment(str(scores["experiment"]))
        model_id = _model_id(model)
        with mlflow.start_run(run_name=f"{scores['experiment']}, {name} of {model}", log_system_metrics=False) as run:
            run_id = str(run.info.run_id)
            known = client.get_run(run_id).data.params  # under `mlflow run` it has some: a param cannot change
            mlflow.log_params({key: value for key, value in params.items() if key not in known})
            dataset, digest = split.mlflow_key
            at = time.time_ns() // 1_000_000
            logged = [Metric(key, value, at, 0, model_id, dataset, digest) for key, value in values.items()]
            client.log_batch(run_id, metrics=logged)
            context = [InputTag(MLFLOW_DATASET_CONTEXT, split.context)]
            data: MetaDataset = as_dataset(split)
            client.log_inputs(
                run_id,
                [DatasetInput(data._to_mlflow_entity(), context)],
                None if model_id is None else [LoggedModelInput(model_id)],
            )
            client.log_text(run_id, json.dumps(scores, indent=2) + "\n", "scores.json")
    return run_id


def _model_id(model: str) -> str | None:
    """Return the id of the logged model that ``--model`` names; None if it is a bundle's folder."""
    client = MlflowClient()
    scheme, _, rest = model.partition(":/")
    if scheme == "models":
        name, _, alias = rest.partition("@")
        if alias:
            version = client.get_model_version_by_alias(name, alias)
        else:
            name, _, number = rest.rpartition("/")
            version = client.get_model_version(name, number)
        return model_id_of(version)
    if scheme == "runs":
        run = client.get_run(rest.strip("/").partition("/")[0])
        outputs = [] if run.outputs is None else run.outputs.model_outputs
        return str(outputs[-1].model_id) if outputs else None
    return None
