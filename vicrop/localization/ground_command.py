"""Ground a phrase in a picture: a box, a mask, and drawings of the localization heads that see it.

    vicrop ground --model llava_tiny photo.jpg "the red sign"

Further settings may follow as KEY=VALUE (vicrop/localization/config.py lists them): logic.selection=greedy

`python -m localization.pipeline` has the same settings; its model is LLaVA-1.5-7B where none is named, as in the paper.
"""

from collections.abc import Sequence

from vicrop.command_line import CommandParser
from vicrop.localization import pipeline
from vicrop.tables import MODELS


def main(argv: Sequence[str] | None = None, prog: str = "vicrop ground") -> None:
    """The command; `prog` is its name in messages."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument("image", help="a picture: any file that Pillow opens")
    parser.add_argument("phrase", help="what to find in it")
    parser.add_argument("--model", default="llava_tiny", help="a hub id, a folder, or one of " + ", ".join(MODELS))
    parser.add_argument("--out", default="outputs/localization", help="folder for the files")
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="further settings; default: those of vicrop/localization/conf"
    )
    given = parser.parse_intermixed_args(argv)
    wrong = [each for each in given.settings if "=" not in each]
    if wrong:
        parser.error(f"settings must be written KEY=VALUE, not {wrong[0]!r}")
    pipeline.main([
        "stage=pipeline", f"model={given.model}", f"data.image_file={given.image}", f"data.query={given.phrase}",
        f"data.output_dir={given.out}", *given.settings,
    ], prog)  # fmt: skip


if __name__ == "__main__":
    main()
