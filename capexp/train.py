"""Train the captioner of an experiment, track the run in MLflow, and register the best captioner."""

import argparse
from typing import TYPE_CHECKING

from capexp import cli
from capexp.distributed import World

if TYPE_CHECKING:
    from capexp.data.captions import PhotosBySplit
    from capexp.data.dataset import Dataset
    from capexp.runs.group import SeedsResult
    from capexp.runs.lifecycle import Plan
    from capexp.runs.run import Result
    from capexp.settings import Experiment


def train(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = cli.Parser("train", __doc__)
    cli.add_experiment(parser, default=None)
    parser.add_argument("--resume", metavar="RUN_ID", help="resume a run that was interrupted")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="train once per seed, at N consecutive seeds; report mean and deviation"
    )
    parser.add_argument(
        "--promote", action="store_true", help="make the captioner champion even if the current one is better"
    )
    parser.add_argument("--dry-run", action="store_true", help="check settings and data, then stop without training")
    parser.add_argument("--decode", action="store_true", help="with --dry-run: open every photo too")
    arguments, settings = parser.parse(argv)
    if arguments.decode and not arguments.dry_run:
        parser.error("--decode goes with --dry-run: a training opens every photo anyway")
    if arguments.resume == "":
        parser.error("--resume needs the id of a run")
    if arguments.resume and arguments.experiment is not None:
        parser.error("--resume takes the experiment from the run; leave --experiment out")
    world = World.from_environment()
    if arguments.seeds is not None and world.size > 1:
        parser.error("--seeds: not under torchrun; give it to one process, or start a run a seed")
    if not world.is_main:
        return 0 if arguments.dry_run else _follow(world)

    experiment = _experiment(parser, arguments, settings)
    print(
        f"experiment {experiment.name}",
        *(f"  {name} = {value}" for name, value in experiment.flat().items()),
        sep="\n",
    )

    from capexp.captioning.captioner import check_fits, neighbours_size
    from capexp.data.dataset import Dataset
    from capexp.data.photos import require_readable

    data = Dataset.read(experiment, drawn=_drawn_before(arguments.resume))
    parameters = check_fits(experiment, data)
    if arguments.dry_run:
        if arguments.decode:
            if not experiment.features.from_photos:
                parser.error("--decode: the features come from features.file, so no photo is opened; leave it out")
            require_readable([path for split in data.splits.values() for path in split.paths()])
        _print_dry_run(experiment, data)
        return 0
    from capexp.runs import group, run
    from capexp.runs.folder import CHECKPOINTS
    from capexp.runs.lifecycle import Plan
    from capexp.tracking.known_runs import adopted_run
    from capexp.tracking.store import check_store
    from capexp.training.checkpoints import check_disk_space

    if arguments.seeds is not None:
        group.check_count(arguments.seeds, experiment)
    check_store(experiment.name, arguments.resume or adopted_run())
    go_there = _way_to_run()
    if go_there is not None:
        print("this run's files are in the folder that MLflow runs the project in (of a Git URI, a temporary one)")
        print(f"to resume after an interrupt:  {go_there}; python -m capexp.train --resume {adopted_run()}", flush=True)
    extra = neighbours_size(experiment, data)
    check_disk_space(CHECKPOINTS, parameters, experiment.training, extra, runs=arguments.seeds or 1)
    world.start()
    world.broadcast(experiment.model_dump_json)
    world.broadcast(lambda: data.drawn)
    data = data.with_features(world)
    _print_data(experiment, data, parameters)
    plan = Plan(experiment, data, promote=arguments.promote)
    if arguments.seeds is not None:
        _print_seeds(cli.print_epochs(group.train_seeds(plan, arguments.seeds, arguments.resume)))
        return 0
    if experiment.is_ensemble:
        result, members = cli.print_epochs(group.train_ensemble(plan, arguments.resume))
        _print_result(
            result, plan, go_there, [f"member      {member} (run {run_id})" for member, run_id in members.items()]
        )
        return 0
    result = cli.print_epochs(run.train(plan, arguments.resume, world))
    _print_result(result, plan, go_there)
    _print_next(arguments.experiment or experiment.name)
    return 0


def _experiment(parser: "cli.Parser", arguments: argparse.Namespace, settings: dict[str, str]) -> "Experiment":
    """Return the experiment to train or resume; if the resumed run has several seeds, set ``arguments.seeds``."""
    from capexp.errors import InputError
    from capexp.experiment import find_experiment, load_experiment, replace_settings

    if arguments.resume is None:
        experiment = load_experiment(find_experiment(cli.experiment_of(arguments)), settings)
    else:
        from capexp.runs.folder import RunFolder
        from capexp.runs.group import count_of_seeds

        folder = RunFolder.to_resume(arguments.resume)
        experiment = replace_settings(folder.experiment(), settings)
        folder.refuse_other_settings(experiment)
        seeds = count_of_seeds(arguments.resume)
        if seeds is None and arguments.seeds is not None:
            parser.error(f"--resume {arguments.resume}: it is a run at one seed; leave --seeds out")
        if seeds is not None and arguments.seeds is not None and arguments.seeds < seeds:
            parser.error(f"--seeds {arguments.seeds}: run {arguments.resume} has {seeds} already; give as many or more")
        arguments.seeds = seeds if arguments.seeds is None else arguments.seeds
        if arguments.seeds is None and folder.is_complete(experiment):
            parser.error(f"--resume {arguments.resume}: the run has finished; to train longer, add --training.epochs N")
    if World.from_environment().size > 1 and (arguments.seeds is not None or experiment.is_ensemble):
        raise InputError(f"experiment {experiment.name}: several runs in one, not under torchrun; start each by itself")
    return experiment


def _drawn_before(run_id: str | None) -> "PhotosBySplit | None":
    """Return the random splits of the run to resume; None if it has none.

    They are not drawn again, because photos may have been added since.
    """
    if run_id is None:
        return None
    from capexp.runs.folder import RunFolder

    return RunFolder.to_resume(run_id).splits()


def _follow(world: World) -> int:
    """Run a rank other than 0: receive the experiment, then compute this rank's shard of features and batches."""
    from capexp.data.dataset import Dataset
    from capexp.runs.lifecycle import Plan
    from capexp.runs.run import follow
    from capexp.settings import Experiment

    world.start()  # returns when rank 0 has checked settings and data; rank 0 reports their errors
    experiment = Experiment.model_validate_json(world.broadcast(str), strict=True)
    data = Dataset.read(experiment, drawn=world.broadcast(dict))
    follow(Plan(experiment, data.with_features(world)), world)
    return 0


def _print_dry_run(experiment: "Experiment", data: "Dataset") -> None:
    from capexp.data.vgg16 import encoder_at_hand

    uncached = data.count_uncached()
    photos = sum(len(split.photos) for split in data.splits.values())
    print(f"dry run: settings and data are fine; {uncached:,} of {photos:,} photos have no features yet")
    views = 1 + experiment.features.mirror + experiment.features.crops
    if uncached and views > 1:
        print(f"each train photo has {views} views, and features of each are computed")
    if not experiment.features.from_photos:
        print(f"features come from {data.encoder}")
    elif uncached and not encoder_at_hand(experiment.features):
        print(f"VGG16's weights are not on this machine: {experiment.features.weights} will be fetched (528 MB)")


def _print_data(experiment: "Experiment", data: "Dataset", parameters: int) -> None:
    train, dev = (data.batches(name, experiment.training) for name in ("train", "dev"))
    print(
        f"{len(train.split.photos):,} train and {len(dev.split.photos):,} dev photos, "
        f"{train.targets:,} and {dev.targets:,} targets, "
        f"longest caption {train.longest} tokens, "
        f"{len(data.vocabulary):,} entries, {parameters:,} trainable parameters",
        flush=True,
    )


def _print_seeds(result: "SeedsResult") -> None:
    columns = ("best_dev_loss", "dev_loss_blind", "dev_bleu_1", "dev_bleu_4", "dev_rouge_l", "dev_cider")
    print(f"\nrun         {result.run_id}\n")
    print(f"{'seed':12}", *(f"{name:>16}" for name in columns), sep="")
    for seed, metrics in result.metrics.items():
        print(f"{seed:<12}", *(f"{metrics[name]:16.4f}" for name in columns), sep="")
    print(f"{'mean':12}", *(f"{result.spreads[name].mean:16.4f}" for name in columns), sep="")
    print(f"{'deviation':12}", *(f"{result.spreads[name].deviation:16.4f}" for name in columns), sep="")
    print(f"\nregistered  {result.version.describe()}")


def _print_result(result: "Result", plan: "Plan", go_there: str | None, members: list[str] | None = None) -> None:
    import os

    from capexp.data.vgg16 import encoder_at_hand

    assert result.version is not None
    print(f"\nrun         {result.run_id}")
    if result.best is not None:
        best = result.best
        print(
            f"best epoch  {best.number}: train loss {best.train_loss:.4f}, dev loss {best.dev_loss:.4f} nats per token"
        )
    else:
        print(*members or (), f"together    dev loss {result.dev_loss:.4f} nats per token", sep="\n")
    print(f"blind       {result.dev_loss_blind:.4f} dev loss with photos shuffled among captions")
    print(f"registered  {result.version.describe()}")
    bundle = result.bundle if go_there is None else result.bundle.absolute()
    print(f"bundle      {bundle}\n")
    for sample in result.samples[:3]:
        print(f"{sample.photo.name}\n  says       {sample.caption}")
        for reference in sample.references[:2]:
            print(f"  reference  {reference}")
    ui = "mlflow ui"
    print("\nnext")
    if go_there is not None:
        print(f"  {go_there}")
        ui = "mlflow ui --backend-store-uri $MLFLOW_TRACKING_URI"
    photo = result.samples[0].photo
    caption = f"python -m capexp.caption --model {result.version.uri}"
    print(f"  {ui:47}  the runs, their curves and captions")
    if plan.data.reference is not None:
        print(
            f"""\
  {caption} --features.weights PATH PHOTO
                                                   PATH: VGG16's weights that the features were computed with;
                                                   they are checked on photos that are at hand"""
        )
    else:
        print(f"  {caption} {os.path.relpath(photo) if photo.is_file() else 'PHOTO'}")
        if not encoder_at_hand(plan.experiment.features):  # otherwise the model holds them
            print(
                """\
                                                   a new photo needs VGG16's weights: fetched once (528 MB),
                                                   or --features.weights PATH"""
            )


def _way_to_run() -> str | None:
    """Return the commands that lead to the files and the store of a run that ``mlflow run`` has started from elsewhere.

    None if the commands that are printed work where the user is.
    """
    import shlex
    from pathlib import Path

    from capexp.tracking.known_runs import adopted_run
    from capexp.tracking.store import store_elsewhere

    store = store_elsewhere()
    if adopted_run() is None or store is None:
        return None
    return f"cd {shlex.quote(str(Path.cwd()))}; export MLFLOW_TRACKING_URI={shlex.quote(store)}"


def _print_next(name: str) -> None:
    print(
        f"  python -m capexp.tune --experiment {name} --trials 20\n"
        "                                                   search embedding size, LSTM units, dropout"
    )
    if name == "scenes":
        print(
            "  python -m capexp.train --experiment flickr8k-merge-conv --captions.root FOLDER\n"
            "                                                   the real thing: Flickr8k"
        )


if __name__ == "__main__":
    cli.main("train", train)
