"""Ask about pictures in a browser: the map, the crop and both answers; and localization heads of a phrase.

vicrop app                                # then open http://127.0.0.1:7860
vicrop app --models llava,llava_tiny      # the models to choose from; a model is loaded when it is first asked

Only this computer reaches it, unless --host says otherwise. It has no password: on another host, whoever reaches the
port can ask the models.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from vicrop.command_line import CommandParser
from vicrop.files import PACKAGE, patient_threads
from vicrop.images import MOST_PIXELS, allow_pixels, refuse_bad_limit
from vicrop.options import device_option
from vicrop.tables import DTYPES, MODELS, known

NEEDS_GRADIO = "needs gradio: pip install 'vicrop[app]'"


def embedded() -> list[str]:
    """The names of the models that come with the package."""
    return [name for name, row in MODELS.items() if (PACKAGE.parent / row["id"]).is_dir()]


def parser_of(prog: str) -> CommandParser:
    """The options; `prog` is what the command is called."""
    parser = CommandParser(prog, __doc__)
    add = parser.add_argument
    add("--models", default=",".join(embedded()), help="models to choose from, comma-separated")
    add("--host", default="127.0.0.1", help="address to listen on: 127.0.0.1 is for this computer only")
    add("--port", type=int, default=7860, help="port to listen on")
    add("--device", type=device_option, help="torch device (default: the first GPU, else the CPU)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on CUDA, float32 elsewhere")
    add("--max_upload_mb", type=int, default=20, help="largest picture file that is taken, in MB")
    add("--max_image_pixels", type=int, default=50_000_000,
        help=f"pictures of up to so many pixels are opened (default: %(default)s, at most {MOST_PIXELS})")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "vicrop app") -> None:
    """The command; `prog` is what it is called."""
    patient_threads()
    parser = parser_of(prog)
    given = parser.parse_args(argv)
    try:
        names = tuple(dict.fromkeys(known(name.strip(), MODELS, "model") for name in given.models.split(",")))
        refuse_bad_limit(given.max_image_pixels)
    except ValueError as error:
        parser.error(str(error))
    if not 1 <= given.port <= 65535:
        parser.error(f"--port must be 1 to 65535, got {given.port}")
    if given.max_upload_mb < 1:
        parser.error(f"--max_upload_mb must be at least 1, got {given.max_upload_mb}")
    serve(given, names, prog)


def serve(given: argparse.Namespace, names: Sequence[str], prog: str) -> None:
    """Serve the app until it is stopped; exit with a sentence where that cannot be."""
    if find_spec("gradio") is None:
        sys.exit(f"{prog} {NEEDS_GRADIO}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from vicrop.app import page
    from vicrop.app.work import OneModel
    from vicrop.checkpoints import quiet_libraries

    quiet_libraries()
    allow_pixels(given.max_image_pixels)
    try:
        page.serve(OneModel(given.device, given.dtype), names, given.host, given.port, given.max_upload_mb)
    except OSError as error:  # the port is taken, or the address is not this computer's
        sys.exit(f"{prog}: {error}")


if __name__ == "__main__":
    main()
