"""Writes the golden bundle of a format, once for each ``format_version``, and what it says.

    python tests/captioning/make_golden.py BUNDLE

takes a captioner of the scenes and puts the bundle, features of dev pictures and their captions into ``golden-N/``.
A bundle of an earlier format is never written again: it stands for those in users' hands.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from capexp.captioning.captioner import Captioner
from capexp.data.dataset import Dataset
from capexp.experiment import find_experiment, load_experiment

PHOTOS = 12


def make(source: Path) -> Path:
    """Writes ``golden-N`` beside this file."""
    version = json.loads((source / "manifest.json").read_text(encoding="utf-8"))["format_version"]
    golden = Path(__file__).with_name(f"golden-{version}")
    if golden.exists():
        sys.exit(f"{golden}: is there; the captions of a format in use must stay as they are")
    golden.mkdir()
    shutil.copytree(source, golden / "bundle")
    captioner = Captioner.load(golden / "bundle")
    experiment = load_experiment(find_experiment("scenes"), {})
    data = Dataset.read(experiment).with_features()
    features = data.features["dev"].gather(np.arange(PHOTOS))
    save_file({"features": features}, golden / "features.safetensors")
    said = [[caption.text, caption.log_probability] for caption in captioner.caption_features(features)]
    (golden / "captions.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return golden


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
