"""The model registry: log a captioner, register it as a version of a model, decide whether it becomes the champion."""

import base64
import importlib.metadata
import io
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import mlflow
import pandas as pd
from mlflow.entities import Metric as LoggedMetric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.utils import requirements_utils
from PIL import Image

from capexp.captioning.captioner import Captioner
from capexp.distributed import environment
from capexp.errors import InputError
from capexp.files import writing
from capexp.settings import Metric, TokenRule
from capexp.tracking.known_runs import adopted_run
from capexp.tracking.models import find_bundle
from capexp.tracking.outbox import Point
from capexp.tracking.store import artifact_faults, check_store, is_missing, prepare_store, store_faults, store_lock

ARTIFACT = "captioner"
CHAMPION = "champion"

# The step of a logged model: MLflow links all metrics of that step to the model. No metric has this step, because
# link_metrics links the wanted metrics.
_NO_STEP = -1
_DIGEST = "decoder_digest"  # the tag that identifies the captioner of a logged model or a version

_PACKAGE = Path(__file__).parents[1]
_REQUIREMENTS = ("mlflow", "torch", "torchvision", "numpy", "pandas", "pillow", "pydantic", "safetensors")
_SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "photo")]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "caption", required=False),
            ColSpec(DataType.double, "log_probability", required=False),
            ColSpec(DataType.string, "error", required=False),
        ]
    ),
    # None means the bundle's own setting.
    params=ParamSchema([ParamSpec("method", DataType.string, None), ParamSpec("beam_width", DataType.long, None)]),
)


@dataclass(frozen=True)
class Score:
    """A captioner's metrics, and all that is needed to compare it with another captioner."""

    metric: Metric
    """The metric that decides the comparison."""
    values: Mapping[Metric, float]
    """All metrics, so that a later captioner may be compared by a different metric."""
    dev_digest: str
    """The digest of the dev split on which the metrics were measured."""
    vocabulary_digest: str
    """The digest of the captioner's vocabulary."""
    tokens: TokenRule = "whitespace"
    """How captions were split for CIDEr; scores of earlier versions of the project do not say so."""

    def tags(self) -> dict[str, str]:
        """Return the score as tags of a registered version."""
        values = {name: repr(self.values[name]) for name in get_args(Metric)}
        return values | {
            "dev_digest": self.dev_digest,
            "vocabulary_digest": self.vocabulary_digest,
            "tokens": self.tokens,
        }

    def beats(self, champion: Mapping[str, str], number: str) -> tuple[bool, str]:
        """Return whether this score is better than the champion's, and the reason.

        ``champion`` are the champion's tags, ``number`` is its version. Losses can be compared only if the
        vocabulary is the same. CIDEr can be compared between vocabularies, because the references are the same, but
        only if captions were split into tokens by the same rule.
        """
        if champion.get("dev_digest") != self.dev_digest:
            return False, f"version {number} was measured on another dev split"
        if self.metric == "dev_loss" and champion.get("vocabulary_digest") != self.vocabulary_digest:
            return False, f"version {number} has another vocabulary, so losses do not compare"
        rule = champion.get("tokens", "whitespace")
        if self.metric == "dev_cider" and rule != self.tokens:
            return False, f"version {number} was scored on captions split by the rule {rule}, this one by {self.tokens}"
        try:
            old = float(champion[self.metric])
        except (KeyError, ValueError):
            return False, f"version {number} has no {self.metric}"
        new = self.values[self.metric]
        better = new < old if self.metric == "dev_loss" else new > old
        comparison = f"{self.metric} {new:.4f} is {{}} than {old:.4f} of version {number}"
        return better, comparison.format("better" if better else "not better")


@dataclass(frozen=True)
class Version:
    """A registered version of a model."""

    name: str
    """The model's name in the registry."""
    number: str
    """The version's number."""
    champion: bool
    """Whether it is the champion."""
    reason: str
    """Why it is the champion, or why not."""

    @property
    def uri(self) -> str:
        """The URI of the version for commands and MLflow; the champion's contains the alias instead of the number."""
        return f"models:/{self.name}@{CHAMPION}" if self.champion else self.numbered_uri

    @property
    def numbered_uri(self) -> str:
        """The URI that always names this version, whichever is the champion."""
        return f"models:/{self.name}/{self.number}"

    def describe(self) -> str:
        """Return a text with the name, the number, and whether and why it is the champion."""
        alias = f"@{CHAMPION} ({self.reason})" if self.champion else f"(not champion: {self.reason})"
        return f"{self.name} version {self.number} {alias}"


def log_captioner(run_id: str, bundle: Path) -> str:
    """Log a captioner to a run as the pyfunc model ``captioner`` with its bundle; return the model's id.

    No weights are downloaded. A captioner that the run already has is not logged again. Models that are incomplete,
    because of a kill or an outage, are deleted.
    """
    client = MlflowClient()
    run = client.get_run(run_id)
    digest = Captioner.load(bundle).digest()
    for model in client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'", max_results=100
    ):
        if str(model.status) != "READY":
            client.delete_logged_model(model.model_id)
        elif model.tags.get(_DIGEST) == digest:
            return str(model.model_id)
    model = client.create_logged_model(
        run.info.experiment_id, ARTIFACT, run_id, resolve_tags({_DIGEST: digest}), dict(run.data.params)
    )
    # MLflow runs the model on the example when it logs it. This must not download weights.
    with environment(CAPEXP_OFFLINE="1"), _unchecked_requirements(), artifact_faults(run_id):
        Model.log(  # as mlflow.pyfunc.log_model does, which however logs only to the active run of this process
            artifact_path=None,
            run_id=run_id,
            model_id=model.model_id,
            step=_NO_STEP,
            flavor=mlflow.pyfunc,
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"bundle": str(bundle)},
            code_paths=[str(_PACKAGE)],
            signature=_SIGNATURE,
            input_example=_example(),
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in _REQUIREMENTS],
        )
    return str(model.model_id)


@contextmanager
def _unchecked_requirements() -> Iterator[None]:
    """Keep MLflow from comparing a model's requirements with the installed packages inside the block.

    The requirements are the installed versions, so the comparison finds nothing. It reads the list of files of every
    installed package, which takes longer than logging the model. MLflow has no setting for it.
    """
    check = requirements_utils._check_requirement_satisfied
    requirements_utils._check_requirement_satisfied = lambda requirement: None
    try:
        yield
    finally:
        requirements_utils._check_requirement_satisfied = check


def register_bundle(bundle: Path, name: str, experiment: str, card: str) -> str:
    """Register a bundle that no run has trained, from a run of its own; return the version's number.

    It is not compared with the champion. ``card`` is the version's description in Markdown.
    """
    check_store(experiment, adopted_run())
    prepare_store()
    captioner = Captioner.load(bundle)
    with store_faults(), tempfile.TemporaryDirectory() as folder:
        named = Path(folder, "bundle")  # MLflow names the artifact like the folder, and refuses a link
        with writing(named):
            shutil.copytree(bundle, named)
        if adopted_run() is None:
            mlflow.set_experiment(experiment)
        with mlflow.start_run(run_name=f"bundle {bundle.name}", log_system_metrics=False) as run:
            number = register_model(log_captioner(str(run.info.run_id), named), name, captioner)
            describe_version(name, number, captioner, card, {})
    return number


def register_model(model_id: str, name: str, captioner: Captioner) -> str:
    """Register a logged captioner as a new version of a model; return the version's number."""
    return str(mlflow.register_model(f"models:/{model_id}", name, tags={_DIGEST: captioner.digest()}).version)


def link_metrics(run_id: str, name: str, number: str, points: Sequence[Point], dataset: tuple[str, str]) -> None:
    """Link metrics of a run to the logged model of a version and to a data set, for MLflow's pages of models.

    ``points`` are values that the run has already, so nothing is added to it. ``dataset`` is the name and the digest of
    the data set in MLflow. Metrics that are linked already are left out.
    """
    client = MlflowClient()
    model_id = model_id_of(client.get_model_version(name, number))
    linked = set() if model_id is None else {metric.key for metric in client.get_logged_model(model_id).metrics or ()}
    metrics = [LoggedMetric(*point, model_id, *dataset) for point in points if point[0] not in linked]
    client.log_batch(run_id, metrics=metrics)


def model_id_of(version: ModelVersion) -> str | None:
    """Return the id of the logged model that a version was registered from; MLflow mostly gives it as the source."""
    scheme, _, source = str(version.source).partition("models:/")
    return str(version.model_id or source) if not scheme and source else None


def registered_version(name: str, run_id: str, captioner: Captioner) -> str | None:
    """Return the version that was registered for a run and contains this captioner, if any.

    So a resumed run registers its captioner only once. An earlier process may have been killed between the creation of
    a version and its model card. Such an incomplete version is returned if it contains this captioner, and deleted if
    it contains an earlier captioner of the run.
    """
    client = MlflowClient()
    digest = captioner.digest()
    registered = None
    for version in client.search_model_versions(f"name='{name}' and run_id='{run_id}'"):
        number = str(version.version)
        version_digest = version.tags.get(_DIGEST)
        # A version with other tags, a description or an alias is kept: its card was begun, or it is a user's own.
        card = version.tags.keys() - {_DIGEST} or version.description
        is_incomplete = not (card or client.get_model_version(name, number).aliases)
        if is_incomplete and version_digest is None:
            version_digest = _read_digest(name, number)
        if version_digest == digest:
            registered = number
        elif is_incomplete and version_digest is not None:
            client.delete_model_version(name, number)
    return registered


def _read_digest(name: str, number: str) -> str | None:
    """Load the captioner of a version and return its digest; None if it cannot be loaded."""
    try:
        return Captioner.load(find_bundle(f"models:/{name}/{number}")).digest()
    except InputError:
        return None


def describe_version(name: str, number: str, captioner: Captioner, description: str, tags: Mapping[str, str]) -> None:
    """Write a version's model card: a description in Markdown, and tags."""
    client = MlflowClient()
    # The digest first: if a kill leaves the card incomplete, a resumed run finds the version by its digest and writes
    # the card again.
    for key, value in {_DIGEST: captioner.digest(), **tags}.items():
        client.set_model_version_tag(name, number, key, value)
    client.update_model_version(name, number, description)


def promote(name: str, number: str, score: Score, force: bool) -> Version:
    """Move the alias ``champion`` to a version if its score is better than the champion's, or if ``force`` is set."""
    client = MlflowClient()
    with store_lock():  # if two runs finish at the same time, the second must be compared with the first
        current = champion_of(name)
        if current == number:
            return Version(name, number, True, "it is champion already")
        if current is None:
            earned, reason = True, "the first champion"
        else:
            earned, reason = score.beats(client.get_model_version(name, current).tags, current)
        if force and not earned:
            earned, reason = True, f"forced, though {reason}"
        if earned:
            client.set_registered_model_alias(name, CHAMPION, number)
    return Version(name, number, earned, reason)


def champion_of(name: str) -> str | None:
    """Return the number of the version with the alias ``champion``, if any."""
    try:
        return str(MlflowClient().get_model_version_by_alias(name, CHAMPION).version)
    except MlflowException as error:
        if is_missing(error):
            return None
        raise


def _example() -> pd.DataFrame:
    """Return a small photo in base64, as a client sends it."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(buffer, "PNG")
    return pd.DataFrame({"photo": [base64.b64encode(buffer.getvalue()).decode()]})
