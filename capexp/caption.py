"""Caption photos, given as files, folders or patterns; print one line per photo: path, tab, caption."""

import json
import sys
from pathlib import Path

from capexp import cli


def caption(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status, which is 1 if a photo could not be captioned."""
    parser = cli.Parser("caption", __doc__, (*cli.ENCODER_SETTINGS, "decoding.", "training.device"))
    cli.add_model(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per photo, with log-probability and alternative captions",
    )
    parser.add_argument(
        "--maps",
        metavar="FOLDER",
        type=Path,
        help="draw the attention at each word, one PNG file per photo (attention decoders only)",
    )
    parser.add_argument("photos", metavar="PHOTO", nargs="+", help="files, folders, or patterns in quotes")
    arguments, settings = parser.parse(argv)
    device = settings.get("training.device", "auto")

    from capexp.captioning.captioner import Caption, Captioner
    from capexp.data.photos import find_photos
    from capexp.distributed import choose_device
    from capexp.experiment import override_decoding
    from capexp.report import attention_maps as maps
    from capexp.tracking.models import find_bundle

    photos = find_photos(arguments.photos)
    captioner = Captioner.load(find_bundle(arguments.model), choose_device(device))
    decoding = override_decoding(captioner.decoding, settings)
    captioner.check_decoding(decoding)
    if arguments.maps is not None:
        maps.require_attention(captioner)
    cli.use_encoder(captioner, settings)
    status = 0
    results = captioner.caption_photos([*photos], decoding)
    for number, (photo, result) in enumerate(zip(photos, results, strict=True), start=1):
        if arguments.maps is not None and isinstance(result, Caption) and result.text:
            weights_by_word = maps.attention_of(captioner, photo, result.text)
            words = captioner.vocabulary.spell(result.text)
            maps.draw_maps(photo, words, weights_by_word, arguments.maps / f"{number:03d}-{photo.stem}.png")
        if not isinstance(result, Caption):
            print(f"capexp.caption: {result}", file=sys.stderr)
            status = 1
        elif arguments.json:
            others = [
                {"caption": other.text, "log_probability": other.log_probability} for other in result.alternatives
            ]
            record = {"photo": str(photo), "caption": result.text, "log_probability": result.log_probability}
            line = json.dumps(record | {"alternatives": others}, ensure_ascii=False)
            print(line.encode(errors="backslashreplace").decode())  # JSON must be UTF-8, but file names may not be
        else:
            print(f"{photo}\t{result.text}")
    return status


if __name__ == "__main__":
    cli.main("caption", caption)
