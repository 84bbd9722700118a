"""Model card and run description: what a captioner or a run is, its scores, and how to use it."""

from collections.abc import Sequence

from capexp import __version__
from capexp.captioning.bundle import TrainingRecord
from capexp.captioning.captioner import Captioner
from capexp.captioning.evaluation import SCORE_NAMES, Evaluation, perplexity
from capexp.data.dataset import Dataset
from capexp.experiment import member_name, members_of
from capexp.settings import Experiment
from capexp.tracking.known_runs import git_commit

_SETTING_LENGTH = 80  # a setting's value is cut to so many characters: a card can have 5,000 in all


def model_card(experiment: Experiment, data: Dataset, captioner: Captioner, evaluation: Evaluation) -> str:
    """Return the description of a registered version, in Markdown."""
    train, dev = data.splits["train"], data.splits["dev"]
    captions = sum(map(len, train.references))
    record, parameters = captioner.record, captioner.decoder.parameter_count()
    assert record is not None
    members = members_of(experiment) if experiment.is_ensemble else ()
    intervals = evaluation.scores.photos.intervals(seed=experiment.seed)

    def interval(key: str) -> str:
        low, high = intervals[key]
        return f"{evaluation.scores.summary[key]:.3f} ({low:.3f} to {high:.3f})"

    scores = ", ".join(f"{title} {interval(key)}" for key, title in SCORE_NAMES.items())
    epoch = "" if record.epoch is None else f", epoch {record.epoch}"
    rows = {
        "dev loss": f"{record.dev_loss:.4f} nats per token (perplexity {perplexity(record.dev_loss):.2f}){epoch}",
        "dev loss, photos shuffled": f"{evaluation.blind.per_token:.4f}",
        "dev captions": f"{scores}: by {experiment.decoding.describe()}, with 95% bootstrap intervals over photos",
        "CIDEr, photos shuffled": f"{evaluation.scores.summary['cider_blind']:.3f}",
        "train loss": "" if record.train_loss is None else f"{record.train_loss:.4f} (dropout on)",
        "members": "; ".join(member_name(member) for member in members),
        "trained on": f"{len(train.photos)} photos, {captions} captions of `{experiment.captions.root.name}`",
        "holds": "the captions of all train photos (`decoding.neighbours`)" if experiment.decoding.neighbours else "",
        "measured on": f"{len(dev.photos)} dev photos; the test split was not read",
        "vocabulary": f"{len(data.vocabulary)} entries, cleaning `{experiment.vocabulary.cleaning}`",
        "parameters": f"{parameters:,} trainable",
        "seed": str(experiment.seed),
        "code": f"capexp {__version__}, commit {git_commit() or 'unknown'}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    settings = "\n".join(
        f"{name} = {value[:_SETTING_LENGTH]}"
        for name, value in experiment.flat().items()
        if name.partition(".")[0] in ("vocabulary", "features", "model", "training", "ensemble", "decoding")
    )
    model = experiment.registry.model
    return f"""{_headline(experiment, data)}

| | |
| --- | --- |
{table}

Reliable only on photos like those it was trained on; elsewhere it can be confidently wrong.

```python
mlflow.pyfunc.load_model("models:/{model}@champion").predict(pandas.DataFrame({{"photo": [base64_text]}}))
mlflow.MlflowClient().set_registered_model_alias("{model}", "champion", "1")  # go back to version 1
```

Settings; all of them, uncut, are in `experiment.toml` among the run's artifacts:

```
{settings}
```
"""


def describe_run(experiment: Experiment, data: Dataset, lines: Sequence[str] = ()) -> str:
    """Return a run's description in MLflow, as Markdown: one line on the kind of run, then one per result."""
    return "\n\n".join([f"{_headline(experiment, data)} Seed {experiment.seed}.", *lines])


def describe_result(experiment: Experiment, record: TrainingRecord, evaluation: Evaluation) -> str:
    """Return a captioner's losses and scores on dev in one line."""
    summary = evaluation.scores.summary
    return (
        f"Dev loss {record.dev_loss:.4f} nats per token ({evaluation.blind.per_token:.4f} image-blind), CIDEr "
        f"{summary['cider']:.3f}, BLEU-4 {summary['bleu_4']:.3f} by {experiment.decoding.describe()}."
    )


def describe_use(model: str) -> str:
    """Return how to use a model, which is given as its bundle's folder or its URI."""
    use = f"Caption a photo with `python -m capexp.caption --model {model} PHOTO`"
    return f"{use}; serve it with `mlflow models serve -m {model} --env-manager local`." if ":/" in model else f"{use}."


def _headline(experiment: Experiment, data: Dataset) -> str:
    """Return a sentence that names the experiment, its decoder and its encoder."""
    if experiment.is_ensemble:
        decoders = sorted({member.model.decoder for member in members_of(experiment)})
        kind = f"ensemble of {' and '.join(decoders)} decoders"
    else:
        kind = f"{experiment.model.decoder} decoder"
    return f"**{experiment.name}**: {kind} on {data.encoder}."
