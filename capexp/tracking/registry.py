"""The model registry: log a captioner, register it, decide whether it is the champion."""

import base64
import importlib.metadata
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from PIL import Image

from capexp.captioning.captioner import Captioner
from capexp.distributed import environment
from capexp.errors import InputError
from capexp.settings import Metric
from capexp.tracking.models import find_bundle
from capexp.tracking.store import artifact_faults, is_missing, store_lock

ARTIFACT = "captioner"
CHAMPION = "champion"

_DIGEST = "decoder_digest"  # the tag that tells which captioner a version holds

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
    # None: as the bundle says.
    params=ParamSchema([ParamSpec("method", DataType.string, None), ParamSpec("beam_width", DataType.long, None)]),
)


@dataclass(frozen=True)
class Score:
    """A captioner's metrics, the one that it is compared by, and what they were measured on."""

    metric: Metric
    values: Mapping[Metric, float]
    """All metrics, so that a later captioner may be compared by another one."""
    dev_digest: str
    vocabulary_digest: str

    def tags(self) -> dict[str, str]:
        """Return the score as tags of a registered version."""
        values = {name: repr(self.values[name]) for name in get_args(Metric)}
        return values | {"dev_digest": self.dev_digest, "vocabulary_digest": self.vocabulary_digest}

    def beats(self, champion: Mapping[str, str], holder: str) -> tuple[bool, str]:
        """Return whether it beats the champion, version ``holder`` with these tags, and why or why not.

        Losses compare over the same vocabulary only; CIDEr compares over any, as references are the same.
        """
        if champion.get("dev_digest") != self.dev_digest:
            return False, f"version {holder} was measured on another dev split"
        if self.metric == "dev_loss" and champion.get("vocabulary_digest") != self.vocabulary_digest:
            return False, f"version {holder} has another vocabulary, so losses do not compare"
        try:
            old = float(champion[self.metric])
        except (KeyError, ValueError):
            return False, f"version {holder} has no {self.metric}"
        new = self.values[self.metric]
        better = new < old if self.metric == "dev_loss" else new > old
        told = f"{self.metric} {new:.4f} is {{}} than {old:.4f} of version {holder}"
        return better, told.format("better" if better else "not better")


@dataclass(frozen=True)
class Version:
    """A registered version, whether it is the champion, and why."""

    name: str
    number: str
    champion: bool
    reason: str

    @property
    def uri(self) -> str:
        """The URI by which commands and MLflow name it."""
        return f"models:/{self.name}@{CHAMPION}" if self.champion else self.numbered_uri

    @property
    def numbered_uri(self) -> str:
        """The URI that names this version for good."""
        return f"models:/{self.name}/{self.number}"

    def describe(self) -> str:
        """Return name, number, and whether and why it is the champion."""
        alias = f"@{CHAMPION} ({self.reason})" if self.champion else f"(not champion: {self.reason})"
        return f"{self.name} version {self.number} {alias}"


def log_captioner(run_id: str, bundle: Path) -> str:
    """Log a captioner to a run as the pyfunc model ``captioner`` with its bundle; return the model's id.

    Nothing is downloaded. A captioner that the run has already is not logged again, and what a kill or an outage has
    cut short is deleted.
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
    # MLflow runs the model on the example when it logs it: that must not download weights.
    with environment(CAPEXP_OFFLINE="1"), artifact_faults(run_id):
        Model.log(  # what mlflow.pyfunc.log_model calls, which knows only the run of this process
            artifact_path=None,
            run_id=run_id,
            model_id=model.model_id,
            flavor=mlflow.pyfunc,
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"bundle": str(bundle)},
            code_paths=[str(_PACKAGE)],
            signature=_SIGNATURE,
            input_example=_example(),
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in _REQUIREMENTS],
        )
    return str(model.model_id)


def register_model(model_id: str, name: str, captioner: Captioner) -> str:
    """Register a logged captioner as a new version of a model; return the version's number."""
    return str(mlflow.register_model(f"models:/{model_id}", name, tags={_DIGEST: captioner.digest()}).version)


def registered_version(name: str, run_id: str, captioner: Captioner) -> str | None:
    """Return the version that holds this very captioner of a run, if any: a resumed run registers it only once.

    A kill may have come between a version and its model card. A version without a card is used where it holds this
    captioner, and deleted where it holds an earlier captioner of the run.
    """
    client = MlflowClient()
    digest = captioner.digest()
    found = None
    for version in client.search_model_versions(f"name='{name}' and run_id='{run_id}'"):
        number = str(version.version)
        held = version.tags.get(_DIGEST)
        # One that holds something of its own, a user has registered.
        others = version.tags.keys() - {_DIGEST} or version.description
        is_bare = not (others or client.get_model_version(name, number).aliases)
        if is_bare and held is None:
            held = _held_digest(name, number)
        if held == digest:
            found = number
        elif is_bare and held is not None:
            client.delete_model_version(name, number)
    return found


def _held_digest(name: str, number: str) -> str | None:
    """Return the digest of the captioner in a version; None where it cannot be read."""
    try:
        return Captioner.load(find_bundle(f"models:/{name}/{number}")).digest()
    except InputError:
        return None


def describe_version(name: str, number: str, captioner: Captioner, description: str, tags: Mapping[str, str]) -> None:
    """Write a version's model card: a description in Markdown, and tags."""
    client = MlflowClient()
    # The digest first: whatever a kill cuts short, a resumed run knows the version by it and writes the card again.
    for key, value in {_DIGEST: captioner.digest(), **tags}.items():
        client.set_model_version_tag(name, number, key, value)
    client.update_model_version(name, number, description)


def promote(name: str, number: str, score: Score, force: bool) -> Version:
    """Move the alias ``champion`` to a version if it scores better, or if forced."""
    client = MlflowClient()
    with store_lock():  # of two that finish at once, the second must see the first
        holder = champion_of(name)
        if holder == number:
            return Version(name, number, True, "it is champion already")
        if holder is None:
            earned, reason = True, "the first champion"
        else:
            earned, reason = score.beats(client.get_model_version(name, holder).tags, holder)
        if force and not earned:
            earned, reason = True, f"forced, though {reason}"
        if earned:
            client.set_registered_model_alias(name, CHAMPION, number)
    return Version(name, number, earned, reason)


def champion_of(name: str) -> str | None:
    """Return the version that the alias points at, if any."""
    try:
        return str(MlflowClient().get_model_version_by_alias(name, CHAMPION).version)
    except MlflowException as error:
        if is_missing(error):
            return None
        raise


def _example() -> pd.DataFrame:
    """Return a small photo as a client sends it, in base64."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(buffer, "PNG")
    return pd.DataFrame({"photo": [base64.b64encode(buffer.getvalue()).decode()]})
