"""Does a checkpoint give here what transformers' stock model gives? Prints what was found; exit 0 only if all holds.

    vicrop check llava_tiny
    vicrop check Qwen/Qwen3-VL-8B-Instruct --json checked.json

Exact on a small twin in float32 (its own config and processor, few layers, random weights): tokens, the map's layout by
its formula and as it is measured, attention of the last token ("rows") and of the question's words ("words"),
gradients, pixel gradients, logits (image; image and crop), answers. Then, roughly, on the loaded model in its dtype.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from vicrop.command_line import CommandParser
from vicrop.files import patient_threads
from vicrop.options import device_option
from vicrop.tables import DTYPES


def main(argv: Sequence[str] | None = None, prog: str = "vicrop check") -> None:
    """The command; `prog` is what it is called."""
    parser = CommandParser(prog, __doc__)
    add = parser.add_argument
    add("model", help="a name of info.MODELS, a hub id or a folder")
    add("--json", type=Path, metavar="FILE", help="also write what was found to this file; default: only print it")
    add("--revision", help="branch, tag or commit of a checkpoint on the hub; default: its main branch")
    add("--dtype", choices=DTYPES, default="auto", help="of the loaded model; auto: bfloat16 on CUDA, else float32")
    add("--device", type=device_option, help="torch device of the loaded model; default: the GPU, else the CPU")
    add("--device_map", choices=("auto",), help="auto: spread a large model over all GPUs; default: one device")
    add("--twin_only", action="store_true", help="do not load the weights: the exact check on the small twin alone")
    given = parser.parse_args(argv)
    patient_threads()
    from vicrop.checked import check_model, lines_of
    from vicrop.checkpoints import quiet_libraries
    from vicrop.choices import ModelChoice
    from vicrop.failures import RECOVERABLE, recoverable_message
    from vicrop.files import write_atomically

    quiet_libraries()
    choice = ModelChoice(given.model, None, given.revision, given.dtype, given.device, given.device_map)
    try:
        found = check_model(choice, twin_only=given.twin_only)
        print("\n".join(lines_of(found)))
        if given.json:
            write_atomically(given.json, found)
    except RECOVERABLE as error:
        sys.exit(f"{prog}: {recoverable_message(error)}")
    sys.exit(1 if found["differs"] else 0)


if __name__ == "__main__":
    main()
