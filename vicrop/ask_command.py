"""Ask about a picture: print both answers, and draw where the model looked and what was cropped.

vicrop ask --model llava_tiny photo.jpg "what number is on the red sign?"
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from vicrop.command_line import CommandParser
from vicrop.files import patient_threads
from vicrop.images import allow_pixels
from vicrop.options import add_method_options, add_model_options, method_choice, model_choice


def main(argv: Sequence[str] | None = None, prog: str = "vicrop ask") -> None:
    """The command; `prog` is what it is called."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument("image", help="a picture: any file that Pillow opens")
    parser.add_argument("question", help="what to ask about it")
    parser.add_argument(
        "--save_path", type=Path, default=Path("."), help="folder for the drawing (default: the current one)"
    )
    add_method_options(parser)
    add_model_options(parser)
    given = parser.parse_args(argv)
    patient_threads()
    try:
        choice, how = model_choice(given), method_choice(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    from vicrop.ask import ask
    from vicrop.checkpoints import quiet_libraries
    from vicrop.failures import RECOVERABLE, recoverable_message

    quiet_libraries()
    allow_pixels(how.max_image_pixels)
    try:
        ask(given.image, given.question, choice, how, given.save_path)
    except RECOVERABLE as error:
        sys.exit(f"{prog}: {recoverable_message(error)}")


if __name__ == "__main__":
    main()
