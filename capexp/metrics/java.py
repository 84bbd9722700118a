"""METEOR, SPICE and the PTB tokenizer: the field's Java programs, if pycocoevalcap and Java are installed.

pycocoevalcap contains the programs. This module starts them itself instead of using its classes, because those write
into the package's folder, print to the terminal, and (METEOR) hang when Java dies. If a program cannot run,
``Unavailable`` is returned.
"""

import importlib.util
import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from capexp.metrics.scores import tokenized
from capexp.settings import TokenRule


@dataclass(frozen=True)
class Unavailable:
    """A score that cannot be computed on this machine."""

    reason: str
    """One line that names the missing part and tells how to install it."""


def meteor(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], rule: TokenRule = "words"
) -> float | Unavailable:
    """Return the corpus score of METEOR 1.5 (Denkowski and Lavie, 2014), English, on the tokens of ``tokenize``.

    The program takes some seconds to start and up to 2 GB of memory.
    """
    requests = [
        " ||| ".join(["SCORE", *(_words(reference) for reference in captions), _words(hypothesis)])
        for hypothesis, captions in tokenized(hypotheses, references, rule)
    ]
    jar = _program("meteor/meteor-1.5.jar")
    if isinstance(jar, Unavailable):
        return jar
    # Send the captions of one photo at a time; send the statistics that come back as one request for the scores.
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    answer = ""
    with tempfile.TemporaryFile() as errors:
        try:
            with subprocess.Popen(
                command,
                cwd=jar.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
            ) as java:
                assert java.stdin and java.stdout
                try:
                    counts = []
                    for request in requests:
                        print(request, file=java.stdin, flush=True)
                        counts.append(java.stdout.readline().strip())
                        if not counts[-1]:
                            raise EOFError("no answer")
                    print(" ||| ".join(["EVAL", *counts]), file=java.stdin, flush=True)
                    for _ in range(len(requests) + 1):  # a score per photo, then the corpus's
                        answer = java.stdout.readline().strip()
                finally:
                    java.kill()
            return float(answer)
        except (OSError, EOFError, ValueError) as error:  # Java has died, or its answer is not a number
            errors.seek(0)
            return Unavailable(_failure("METEOR", errors.read().decode(errors="replace") or f"{answer}\n{error}"))


def spice(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], rule: TokenRule = "words"
) -> float | Unavailable:
    """Return SPICE 1.0 (Anderson et al., ECCV 2016): the mean over photos of the F-measure of scene graphs.

    SPICE parses with Stanford CoreNLP 3.6.0, whose models (half a gigabyte) pycocoevalcap does not contain. This
    function never downloads them; the reason of ``Unavailable`` names the command that does. A photo for which SPICE
    gives no number, because its captions have no scene graph, counts as 0.
    """
    photos = [
        {"image_id": position, "test": " ".join(hypothesis), "refs": [" ".join(reference) for reference in captions]}
        for position, (hypothesis, captions) in enumerate(tokenized(hypotheses, references, rule))
    ]
    jar = _program("spice/spice-1.0.jar")
    if isinstance(jar, Unavailable):
        return jar
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        if not (jar.parent / "lib" / name).is_file():
            return Unavailable(
                f"SPICE's {name} is missing; `python -m pycocoevalcap.spice.get_stanford_models` downloads it"
            )
    with tempfile.TemporaryDirectory() as folder:
        requests, answers = Path(folder, "photos.json"), Path(folder, "scores.json")
        requests.write_text(json.dumps(photos), encoding="utf-8")
        options = ["-Xmx8G", "-jar", str(jar), str(requests), "-out", str(answers), "-subset", "-silent"]
        output = _java("SPICE", options, Path(folder))
        if isinstance(output, Unavailable):
            return output
        scores = [photo["scores"]["All"]["f"] for photo in json.loads(answers.read_text(encoding="utf-8"))]
    numbers = [0.0 if score is None or math.isnan(float(score)) else float(score) for score in scores]
    return math.fsum(numbers) / len(photos)


def ptb_tokenize(captions: Sequence[str]) -> list[str] | Unavailable:
    """Tokenize captions as COCO's evaluation does: lower-case Penn Treebank tokens, without punctuation.

    Return each caption's tokens, joined by spaces. Brackets stay, as ``-lrb-`` and ``-rrb-``: COCO's list of
    punctuation has them in capitals only.
    """
    jar = _program("tokenizer/stanford-corenlp-3.4.1.jar")
    if isinstance(jar, Unavailable):
        return jar
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS  # type: ignore[import-untyped]

    name = "edu.stanford.nlp.process.PTBTokenizer"
    options = ["-cp", str(jar), name, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    lines = "".join(" ".join(caption.split()) + "\n" for caption in captions)
    output = _java("the PTB tokenizer", ["-Dfile.encoding=UTF-8", *options], Path.cwd(), lines)
    if isinstance(output, Unavailable):
        return output
    rows = output.splitlines()
    if len(rows) != len(captions):
        return Unavailable(f"the PTB tokenizer answers {len(captions)} captions with {len(rows)} lines")
    return [" ".join(token for token in row.split() if token not in PUNCTUATIONS) for row in rows]


def _words(tokens: Sequence[str]) -> str:
    """Join tokens for METEOR, without the ``|||`` that separates the fields of its input lines."""
    return " ".join(token.replace("|||", "") for token in tokens)


def _program(jar: str) -> Path | Unavailable:
    """Return the path of a program within pycocoevalcap, if Java is installed too."""
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        return Unavailable("the package pycocoevalcap is not installed; pip install pycocoevalcap")
    if shutil.which("java") is None:
        return Unavailable(
            "no `java` on the PATH; install a Java runtime, for instance the package default-jre-headless"
        )
    path = Path(next(iter(package.submodule_search_locations)), jar)
    return path if path.is_file() else Unavailable(f"{path} is missing; pip install --force-reinstall pycocoevalcap")


def _java(program: str, options: list[str], folder: Path, lines: str = "") -> str | Unavailable:
    """Run a Java program and return its output. Kill the program if this process is interrupted."""
    try:
        java = subprocess.run(
            ["java", *options], cwd=folder, input=lines, capture_output=True, encoding="utf-8", check=False
        )
    except OSError as error:
        return Unavailable(_failure(program, str(error)))
    return java.stdout if java.returncode == 0 else Unavailable(_failure(program, java.stderr))


def _failure(program: str, output: str) -> str:
    """Return the last line of Java's error output, without the stack trace, as the reason of ``Unavailable``."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith(("\t", " "))]
    return f"{program} does not run with this Java: {lines[-1][:200] if lines else 'it ended without a word'}"
