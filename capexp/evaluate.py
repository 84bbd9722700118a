"""Evaluate a captioner on a split: loss and scores, and loss and CIDEr with photos shuffled (image-blind baseline)."""

import json
import sys

from capexp import cli


def evaluate(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    used = ("captions.", "features.", "decoding.", "training.batch_size", "training.device", "seed")
    parser = cli.Parser("evaluate", __doc__, used)
    cli.add_split(parser)
    cli.add_model(parser)
    parser.add_argument(
        "--java", action="store_true", help="also compute METEOR and SPICE, which need Java and pycocoevalcap"
    )
    parser.add_argument(
        "--log",
        action="store_true",
        help="log the scores to MLflow as a run of its own, linked to the model and the split; under mlflow run, which "
        "makes a run, they are always logged",
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
    captioner = Captioner.load(find_bundle(arguments.model), device)
    captioner.decoding = override_decoding(captioner.decoding, settings)
    if arguments.experiment is None:
        evaluation.require_trained_on(experiment, captioner)
    scores = evaluation.evaluate(experiment, captioner, arguments.split, arguments.java) | {"model": arguments.model}
    text = json.dumps(scores, indent=2)
    print(text)
    if arguments.output is not None:
        write_whole(arguments.output, text + "\n")
    from capexp.tracking.known_runs import adopted_run

    if arguments.log or adopted_run() is not None:
        from capexp.tracking.evaluation_run import log_evaluation
        from capexp.tracking.run import Input

        path = experiment.captions.list_of(arguments.split)
        context = "evaluation" if arguments.split == "test" else "validation"
        data = Input(f"{experiment.name}-{arguments.split}", context, path, str(scores["split_digest"]))
        print(f"logged as run {log_evaluation(scores, data)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.main("evaluate", evaluate)
