"""Captions photos: one line each, the path, a tab, the caption."""

import json
import sys
from pathlib import Path

from capexp import command


def caption(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 1 where some photo could not be captioned."""
    parser = command.Parser("caption", __doc__, "Only --features.weights and --training.device decide something here.")
    command.add_model(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with the log-probability")
    parser.add_argument("photos", metavar="PHOTO", nargs="+", type=Path)
    arguments, settings = parser.parse(argv)
    command.refuse_idle(parser, settings, ("features.weights", "training.device"))
    weights, device = settings.get("features.weights"), settings.get("training.device", "auto")

    from capexp.captioning.captioner import Caption, Captioner
    from capexp.tracking.registry import find_bundle
    from capexp.training.fit import choose_device

    captioner = Captioner.load(find_bundle(arguments.model), choose_device(device))
    captioner.use_encoder(weights)
    status = 0
    for photo, result in zip(arguments.photos, captioner.caption_photos(arguments.photos), strict=True):
        if not isinstance(result, Caption):
            print(f"capexp.caption: {result}", file=sys.stderr)
            status = 1
        elif arguments.json:
            record = {"photo": str(photo), "caption": result.text, "log_probability": result.log_probability}
            print(json.dumps(record, ensure_ascii=False))
        else:
            print(f"{photo}\t{result.text}")
    return status


if __name__ == "__main__":
    command.main("caption", caption)
