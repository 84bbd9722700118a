"""The model card: the description of a registered version, its scores, and how to use it."""

from capexp import __version__
from capexp.captioning.captioner import Captioner
from capexp.captioning.evaluation import SCORE_NAMES, Evaluation, perplexity
from capexp.data.dataset import Dataset
from capexp.experiment import member_name, members_of
from capexp.settings import Experiment
from capexp.tracking.run import git_commit

_SETTING_LENGTH = 80  # characters of a setting on the card, which can hold 5,000 in all


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
    decoders = {member.model.decoder for member in members}
    kind = (
        f"ensemble of {' and '.join(sorted(decoders))} decoders" if decoders else f"{experiment.model.decoder} decoder"
    )
    return f"""**{experiment.name}**: {kind} on {data.encoder}.

| | |
| --- | --- |
{table}

It says what it has seen people say of such photos: of others it may be wrong, and sure of it.

```python
mlflow.pyfunc.load_model("models:/{model}@champion").predict(pandas.DataFrame({{"photo": [base64_text]}}))
mlflow.MlflowClient().set_registered_model_alias("{model}", "champion", "1")  # go back to version 1
```

Settings; the whole of them is `experiment.toml` among the run's artifacts:

```
{settings}
```
"""
