"""Trains one experiment, tracked by MLflow, and registers its best captioner."""

import os
from contextlib import closing
from typing import TYPE_CHECKING

from capexp import cli

if TYPE_CHECKING:
    from pathlib import Path

    from capexp.distributed import Ranks
    from capexp.report.gallery import Card
    from capexp.runs.ensembles import Ensembled
    from capexp.runs.run import Result
    from capexp.runs.seeds import Seeds
    from capexp.tracking.registry import Version
    from capexp.training.epoch import Epoch


def train(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = cli.Parser("train", __doc__)
    cli.add_experiment(parser, default=None)
    parser.add_argument("--resume", metavar="RUN_ID", help="go on with a run that was stopped")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="train at N seeds, in turn: mean and spread of what comes"
    )
    parser.add_argument("--promote", action="store_true", help="make the model champion whatever it scores")
    parser.add_argument("--dry-run", action="store_true", help="check settings and data, then stop")
    arguments, settings = parser.parse(argv)
    if arguments.resume == "":
        parser.error("--resume needs the id of a run")
    if arguments.resume and arguments.experiment is not None:
        parser.error("--resume takes the experiment from the run; leave --experiment out")

    from capexp import experiment as experiments
    from capexp.distributed import place

    ranks = place()
    if arguments.seeds is not None and ranks.count > 1:
        parser.error("--seeds: not under torchrun; give it to one process, or start a run a seed")
    if not ranks.is_first:
        return 0 if arguments.dry_run else _follow(ranks)
    count: int | None = arguments.seeds
    if arguments.resume:
        from capexp.runs import folder as run_folder, seeds

        before = run_folder.settings_of(arguments.resume)
        experiment = experiments.replace(before, settings)
        run_folder.refuse_other_settings(arguments.resume, before, experiment)
        held = seeds.seeds_of(arguments.resume)
        if held is None and count is not None:
            parser.error(f"--resume {arguments.resume}: it is a run at one seed; leave --seeds out")
        count = count or held
        if count is None and run_folder.is_complete(arguments.resume, experiment):
            parser.error(f"--resume {arguments.resume}: the run has finished; go on with --training.epochs N")
    else:
        experiment = experiments.load(experiments.find(cli.experiment_of(arguments)), settings)
    print(
        f"experiment {experiment.name}",
        *(f"  {name} = {value}" for name, value in experiment.flat().items()),
        sep="\n",
    )

    from capexp.data.vgg16 import encoder_at_hand
    from capexp.errors import InputError
    from capexp.preparation import prepare, read

    data = read(experiment)
    if arguments.dry_run:
        lacking = data.lacking(experiment)
        count = sum(len(split.photos) for split in data.splits.values())
        print(f"dry run: settings and data are fine; {lacking:,} of {count:,} photos have no features yet")
        if lacking and not encoder_at_hand(experiment.features):
            print(f"VGG16's weights are not here: {experiment.features.weights} will be fetched (528 MB)")
        return 0
    from capexp.runs import ensembles, folder as run_folder, run as runs, seeds
    from capexp.tracking.store import check_store
    from capexp.training.checkpoints import refuse_cramped

    if ranks.count > 1 and (count is not None or experiment.is_ensemble):
        raise InputError(f"experiment {experiment.name}: several runs in one, not under torchrun; start each by itself")
    if count is not None:
        seeds.check_count(count, experiment)
    check_store()
    phases = run_folder.phases(experiment)
    refuse_cramped(run_folder.CHECKPOINTS, data.decoder_parameters, experiment.training.keep, phases)
    ranks.join()
    ranks.from_first(experiment.model_dump_json)
    prepared = prepare(experiment, data, ranks)
    train_split, dev_split = prepared.splits["train"], prepared.splits["dev"]
    train_batches, dev_batches = (prepared.batches(name, experiment.training) for name in ("train", "dev"))
    print(
        f"{len(train_split.photos):,} train and {len(dev_split.photos):,} dev photos, "
        f"{train_batches.targets:,} and {dev_batches.targets:,} targets, "
        f"longest caption {train_batches.longest} tokens, "
        f"{len(prepared.vocabulary):,} entries, {prepared.decoder_parameters:,} trainable parameters",
        flush=True,
    )
    if count is not None:
        started = seeds.run_seeds(experiment, prepared, count, resume=arguments.resume, promote=arguments.promote)
        with closing(started) as epochs_of_seeds:
            while True:
                try:
                    seed, epoch = next(epochs_of_seeds)
                    _print_epoch(epoch, f"seed {seed:3d}   ")
                except StopIteration as stop:
                    _print_seeds(stop.value)
                    return 0
    name = arguments.experiment or experiment.name
    if experiment.is_ensemble:
        ensembled = ensembles.run_ensemble(experiment, prepared, resume=arguments.resume, promote=arguments.promote)
        with closing(ensembled) as epochs_of_members:
            while True:
                try:
                    member, epoch = next(epochs_of_members)
                    _print_epoch(epoch, f"{member}   ")
                except StopIteration as stop:
                    _print_ensemble(stop.value)
                    return 0
    started_run = runs.run(experiment, prepared, resume=arguments.resume, promote=arguments.promote, ranks=ranks)
    with closing(started_run) as epochs:
        while True:
            try:
                _print_epoch(next(epochs))
            except StopIteration as stop:
                _print_result(name, stop.value)
                return 0


def _follow(ranks: "Ranks") -> int:
    """What each of torchrun's processes but the first does: its share of the features and of each batch."""
    from capexp.experiment import Experiment
    from capexp.preparation import prepare, read
    from capexp.runs import run as runs

    ranks.join()  # the first one has checked settings and data, or told what is wrong with them
    experiment = Experiment.model_validate_json(ranks.from_first(str), strict=True)
    runs.follow(experiment, prepare(experiment, read(experiment), ranks), ranks)
    return 0


def _print_epoch(epoch: "Epoch", before: str = "") -> None:
    star = "  *" if epoch.improved else ""
    second = "" if epoch.reward is None else f"reward {epoch.reward:.4f}   dev CIDEr {epoch.dev_cider:.4f}   "
    print(
        f"{before}epoch {epoch.number:3d}   train {epoch.train_loss:.4f}   dev {epoch.dev_loss:.4f}   "
        f"{second}{epoch.seconds:.1f} s{star}",
        flush=True,
    )


def _print_seeds(result: "Seeds") -> None:
    shown = ("best_dev_loss", "dev_loss_blind", "dev_bleu_1", "dev_bleu_4", "dev_rouge_l", "dev_cider")
    print(f"\nrun         {result.run_id}\n")
    print(f"{'seed':16}", *(f"{name:>14}" for name in shown), sep="")
    for seed, metrics in result.metrics.items():
        print(f"{seed:<16}", *(f"{metrics[name]:14.4f}" for name in shown), sep="")
    print(f"{'mean':16}", *(f"{result.spreads[name].mean:14.4f}" for name in shown), sep="")
    print(f"{'deviation':16}", *(f"{result.spreads[name].deviation:14.4f}" for name in shown), sep="")
    print(f"\nregistered  {result.version.describe()}")


def _print_ensemble(result: "Ensembled") -> None:
    print(f"\nrun         {result.run_id}")
    for member, run_id in result.members.items():
        print(f"member      {member} (run {run_id})")
    print(f"together    dev loss {result.dev_loss:.4f} nats per token")
    _print_captioner(result.dev_loss_blind, result.version, result.bundle, result.samples)


def _print_result(name: str, result: "Result") -> None:
    best = result.best
    assert result.dev_loss_blind is not None and result.version is not None
    print(f"\nrun         {result.run_id}")
    print(f"best epoch  {best.number}: train loss {best.train_loss:.4f}, dev loss {best.dev_loss:.4f} nats per token")
    _print_captioner(result.dev_loss_blind, result.version, result.bundle, result.samples)
    print(
        f"  python -m capexp.tune --experiment {name} --trials 20\n"
        "                                                   search embedding size, LSTM units, dropout"
    )
    if name == "scenes":
        print(
            "  python -m capexp.train --experiment flickr8k-merge-conv --captions.root FOLDER\n"
            "                                                   the real thing: Flickr8k"
        )


def _print_captioner(dev_loss_blind: float, version: "Version", bundle: "Path", samples: "tuple[Card, ...]") -> None:
    photo = os.path.relpath(samples[0].photo)
    print(f"blind       {dev_loss_blind:.4f} dev loss with photos shuffled among captions")
    print(f"registered  {version.describe()}")
    print(f"bundle      {bundle}\n")
    for sample in samples[:3]:
        print(f"{sample.photo.name}\n  says       {sample.caption}")
        for reference in sample.references[:2]:
            print(f"  reference  {reference}")
    print(
        f"""
next
  mlflow ui                                        the runs, their curves and captions
  python -m capexp.caption --model {version.uri} {photo}
                                                   a new photo needs VGG16's weights: fetched once (528 MB),
                                                   or --features.weights PATH"""
    )


if __name__ == "__main__":
    cli.main("train", train)
