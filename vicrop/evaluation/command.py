"""ViCrop over a dataset or one picture: look, find the box, crop, answer again.

    vicrop run --model llava_tiny --task demo --method rel_att
    vicrop run --model llava_tiny --image photo.jpg --question "what number is on the red sign?"

Killed? The same command goes on where it stopped.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from vicrop.evaluation.run_options import Picture, parser_of_runs, picture_of, settings_of
from vicrop.evaluation.settings import RunSettings
from vicrop.files import patient_threads
from vicrop.images import allow_pixels


def parse(
    argv: Sequence[str] | None = None, prog: str = "run.py", results: Path = Path("data/results")
) -> tuple[RunSettings, Picture | None]:
    """(settings, the picture to ask about or None) of a command line.

    Args:
        prog: the command's name in messages; results: where results are written without --save_path.
    """
    parser = parser_of_runs(prog, __doc__)
    given = parser.parse_args(argv)
    try:
        picture = picture_of(given)
        return settings_of(given, Path(".") if picture else results), picture
    except (ValueError, OSError) as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None, prog: str = "run.py", results: Path = Path("data/results")) -> None:
    """The command; it takes the arguments of `parse`."""
    patient_threads()
    settings, picture = parse(argv, prog, results)
    from vicrop.checkpoints import quiet_libraries
    from vicrop.failures import RECOVERABLE, recoverable_message

    quiet_libraries()
    allow_pixels(settings.how.max_image_pixels)
    try:
        if picture:
            from vicrop.ask import ask

            ask(picture.path, picture.question, settings.model, settings.how, settings.save_path)
        else:
            from vicrop.evaluation.runner import run_task

            run_task(settings)
    except RECOVERABLE as error:
        sys.exit(f"{prog}: {recoverable_message(error)}")


if __name__ == "__main__":
    main()
