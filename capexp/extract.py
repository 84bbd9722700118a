"""Computes the features of an experiment's photos ahead of time, into its cache."""

import resource
import time

from capexp import cli


def extract(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = cli.Parser("extract", __doc__)
    cli.add_experiment(parser)
    parser.add_argument(
        "--split", choices=("train", "dev", "test"), action="append", help="default: all that are listed"
    )
    parser.add_argument("--clear", action="store_true", help="compute what is cached of these photos anew")
    arguments, settings = parser.parse(argv)

    from capexp import experiment as experiments
    from capexp.data.cache import FeatureCache
    from capexp.data.captions import read_splits
    from capexp.data.vgg16 import identify
    from capexp.distributed import place
    from capexp.preparation import passes, read_features

    cli.refuse_idle(parser, settings, ("captions.", "features.", "training.device"))
    ranks = place()
    if arguments.clear and ranks.count > 1:
        parser.error("--clear: not under torchrun; give it to one process alone")
    if not ranks.is_first:
        ranks.join()  # what is wrong for all, the first tells
    experiment = experiments.load(experiments.find(arguments.experiment), settings)
    splits = list(read_splits(experiment.captions, arguments.split).values())
    identity = identify(experiment.features)
    if ranks.is_first:
        ranks.join()
    start = time.perf_counter()
    mirror = experiment.features.mirror
    features = read_features(experiment, splits, identity, mirror=mirror, anew=arguments.clear, ranks=ranks)
    ranks.leave()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = 0
    for some, encoder in passes(splits, identity, mirror):
        cache = FeatureCache(experiment.features.cache, encoder)
        size += cache.path.stat().st_size
        count, names = sum(len(features[split.name]) for split in some), ", ".join(split.name for split in some)
        print(f"{cache.path}: {count:,} photos of {names}, {encoder}")
    print(f"{size / 2**20:.1f} MiB; {seconds:.1f} s, peak memory {peak:.2f} GiB")
    return 0


if __name__ == "__main__":
    cli.main("extract", extract)
