"""Serve a web page on which users drop a photo and see its caption and alternative captions."""

import argparse
import socket

from capexp import cli


def app(argv: list[str] | None = None) -> int:
    """Run the command: serve the page until it is interrupted."""
    parser = cli.Parser("app", __doc__, (*cli.ENCODER_SETTINGS, "decoding.", "training.device"))
    cli.add_model(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; use 0.0.0.0 to let other machines open the page (default: %(default)s)",
    )
    parser.add_argument("--port", type=_port, default=7860, help="port to listen on (default: %(default)s)")
    arguments, settings = parser.parse(argv)
    device = settings.get("training.device", "auto")

    from capexp.captioning.captioner import Captioner
    from capexp.distributed import choose_device
    from capexp.errors import InputError
    from capexp.experiment import override_decoding
    from capexp.tracking.models import find_bundle

    try:
        from capexp.report import page
    except ModuleNotFoundError as error:
        if error.name != "streamlit":
            raise
        raise InputError("the page needs Streamlit; in the checkout: pip install -e '.[app]'") from None
    _refuse_taken(arguments.host, arguments.port)
    captioner = Captioner.load(find_bundle(arguments.model), choose_device(device))
    decoding = override_decoding(captioner.decoding, settings)
    captioner.check_decoding(decoding)
    cli.use_encoder(captioner, settings)
    print(f"a page to try {arguments.model}: http://{arguments.host}:{arguments.port} (Ctrl-C ends it)", flush=True)
    page.serve(page.ServedCaptioner(captioner, arguments.model, decoding), arguments.host, arguments.port)
    return 0


def _port(text: str) -> int:
    """Convert the value of ``--port``."""
    port = int(text)
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not between 1 and 65535")
    return port


def _refuse_taken(host: str, port: int) -> None:
    """Raise InputError if this machine cannot listen on the address, for example because the port is in use."""
    from capexp.errors import InputError

    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except socket.gaierror as error:
        raise InputError(f"--host {host}: {error.strerror}; give an address of this machine") from None
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}; give another") from None


if __name__ == "__main__":
    cli.main("app", app)
