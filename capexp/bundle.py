"""Make a captioner's bundle of the Flickr8k tutorial's saved Keras model and tokenizer, so that every command takes it.

Neither Keras nor TensorFlow is needed, and nothing in the files is run. The features are those of the tutorial: by
default features.weights is KERAS and features.resize is nearest. With features.file the bundle takes the features of
that file, such as the tutorial's features.pkl; VGG16's weights are then needed only to caption new photos.
"""

import shlex
from pathlib import Path

from capexp import cli

_TUTORIAL = "flickr8k-tutorial"  # the experiment with the tutorial's features


def bundle(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    features = ("features.weights", "features.net", "features.resize", "features.file")
    used = (*features, "captions.", "decoding.", "registry.model")
    parser = cli.Parser("bundle", __doc__, used)
    parser.add_argument(
        "--keras", metavar="MODEL.h5", type=Path, required=True, help="the model that Keras has saved (.h5 or .keras)"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", type=Path, required=True, help="its Keras Tokenizer, pickled or as JSON"
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="the new folder of the bundle")
    parser.add_argument(
        "--without-encoder",
        action="store_true",
        help="leave VGG16's weights (256 MiB) out; captioning photos will then need --features.weights",
    )
    arguments, settings = parser.parse(argv)
    if arguments.output.exists() or arguments.output.is_symlink():
        parser.error(f"--output {arguments.output}: exists already; name a new folder")
    if not arguments.output.absolute().parent.is_dir():
        parser.error(f"--output {arguments.output}: no folder {arguments.output.parent}; make it first")

    from capexp.captioning.captioner import Captioner
    from capexp.captioning.keras_model import read_keras_model
    from capexp.data.cache import Identity
    from capexp.data.encoder_check import Reference
    from capexp.data.feature_files import FeatureFile
    from capexp.data.inert_pickle import read_tokenizer
    from capexp.data.vgg16 import load_encoder
    from capexp.experiment import find_experiment, load_experiment, override_decoding
    from capexp.settings import DecodingConfig

    experiment = load_experiment(find_experiment(_TUTORIAL), settings)
    model = read_keras_model(arguments.keras)
    vocabulary, state = model.convert(read_tokenizer(arguments.tokenizer))
    decoding = override_decoding(DecodingConfig(maximum_length=model.maximum_length), settings)
    if experiment.features.from_photos:
        model.require_features(*experiment.features.shape)
        encoder = load_encoder(experiment.features)
        identity: Identity = encoder.identity
        weights = None if arguments.without_encoder else encoder.weights()
        reference = None
    else:
        if arguments.without_encoder:
            parser.error("--without-encoder: a bundle with features.file holds no encoder anyway; leave it out")
        file = FeatureFile.open(experiment.features, experiment.captions)
        model.require_features(*file.identity.shape)
        identity, weights = file.identity, None
        reference = Reference(experiment.captions.photos_of("train").absolute(), file.sample(Reference.MOST))
    captioner = Captioner.of_weights(model.config, state, vocabulary, identity, decoding)
    captioner.reference = reference
    captioner.check_decoding(decoding)
    captioner.save(arguments.output, weights)
    print(f"bundle      {arguments.output}: {len(vocabulary.words):,} words, features of {identity}")
    if "registry.model" in settings:
        from capexp.tracking.registry import register_bundle

        card = f"The Flickr8k tutorial's captioner, as Keras has saved it in {arguments.keras.name}, on {identity}."
        name = experiment.registry.model
        number = register_bundle(arguments.output, name, experiment.name, card)
        print(f"registered  {name} version {number}: models:/{name}/{number}")
    flags = [f"--{name} {shlex.quote(value)}" for name, value in settings.items() if not name.startswith("registry.")]
    evaluate = f"python -m capexp.evaluate --experiment {_TUTORIAL} --model {shlex.quote(str(arguments.output))}"
    print("evaluate it with ", evaluate, *flags)
    return 0


if __name__ == "__main__":
    cli.main("bundle", bundle)
