"""Compare two captioners on the same photos, with a paired bootstrap test."""

import json
from dataclasses import asdict

from capexp import cli

_SHOWN = 5  # the number of photos printed from each end of the list that is sorted by the difference in CIDEr


def compare(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = cli.Parser("compare", __doc__, ("captions.", "features.", "decoding.", "training.device", "seed"))
    cli.add_split(parser)
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs=2,
        help="the two captioners, given like --model of capexp.evaluate; differences are second minus first",
    )
    arguments, settings = parser.parse(argv)
    cli.refuse_output(parser, arguments.output)

    from capexp.captioning import evaluation
    from capexp.captioning.captioner import Captioner
    from capexp.distributed import choose_device
    from capexp.experiment import find_experiment, load_experiment, override_decoding
    from capexp.files import write_whole
    from capexp.tracking.models import find_bundle

    experiment = load_experiment(find_experiment(cli.experiment_of(arguments)), settings)
    device = choose_device(experiment.training.device)
    first, second = [Captioner.load(find_bundle(model), device) for model in arguments.models]
    for captioner in (first, second):
        captioner.decoding = override_decoding(captioner.decoding, settings)
        if arguments.experiment is None:
            evaluation.require_trained_on(experiment, captioner)
    compared = evaluation.compare(experiment, (first, second), arguments.split)
    print(f"A  {arguments.models[0]}\nB  {arguments.models[1]}\n{compared.photos:,} photos of {arguments.split}\n")
    print(f"{'':12}{'A':>8}{'B':>8}{'B - A':>9}   95% interval        p")
    for name, difference in compared.differences.items():
        before, after = (scores[name] for scores in compared.scores)
        print(
            f"{name:12}{before:8.3f}{after:8.3f}{difference.value:+9.3f}   "
            f"{difference.low:+.3f} to {difference.high:+.3f}   {difference.p:.4f}"
        )
    print(f"\n{len(compared.most):,} photos have different captions; those that differ most in CIDEr:")
    ends = compared.most if len(compared.most) <= 2 * _SHOWN else compared.most[:_SHOWN] + compared.most[-_SHOWN:]
    for photo in ends:
        print(photo.photo)
        for letter, caption, cider in zip("AB", photo.captions, photo.cider, strict=True):
            print(f"  {letter}  {cider:5.2f}  {caption}")
    if arguments.output is not None:
        record = {"models": arguments.models, "split": arguments.split, **asdict(compared)}
        write_whole(arguments.output, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    cli.main("compare", compare)
