"""Compute the features of an experiment's photos before training, into the cache."""

import resource
import time

from capexp import cli


def extract(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = cli.Parser("extract", __doc__, ("captions.", "features.", "training.device"))
    cli.add_experiment(parser)
    parser.add_argument(
        "--split",
        choices=("train", "dev", "test"),
        action="append",
        help="split to extract; repeat the flag for several (default: all that exist)",
    )
    parser.add_argument(
        "--clear", action="store_true", help="recompute the features of these photos even if they are cached"
    )
    arguments, settings = parser.parse(argv)

    from capexp.data.cache import FeatureCache
    from capexp.data.captions import read_splits
    from capexp.data.sources import open_source
    from capexp.distributed import World
    from capexp.experiment import find_experiment, load_experiment

    world = World.from_environment()
    if arguments.clear and world.size > 1:
        parser.error("--clear: not under torchrun; give it to one process alone")
    if not world.is_main:
        world.start()  # wait until rank 0 has checked settings and data, so that only it reports their errors
    experiment = load_experiment(find_experiment(arguments.experiment), settings)
    with_photos = experiment.features.from_photos
    splits = list(read_splits(experiment.captions, arguments.split, with_photos=with_photos).values())
    source = open_source(experiment)
    _ = source.identity  # weights whose digest is not known are read, or fetched
    if world.is_main:
        world.start()
    start = time.perf_counter()
    features = source.compute(splits, recompute=arguments.clear, world=world)
    world.stop()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = 0
    for group, encoder in source.passes(splits):
        cache = FeatureCache(experiment.features.cache, encoder)
        size += cache.path.stat().st_size
        count, names = sum(len(features[split.name]) for split in group), ", ".join(split.name for split in group)
        print(f"{cache.path}: {count:,} photos of {names}, {encoder}")
    print(f"{size / 2**20:.1f} MiB; {seconds:.1f} s, peak memory {peak:.2f} GiB")
    return 0


if __name__ == "__main__":
    cli.main("extract", extract)
