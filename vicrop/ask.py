"""One question about one picture: both answers, and a drawing of what each method looked at."""

from pathlib import Path

from vicrop.choices import MethodChoice, ModelChoice
from vicrop.crop import QuestionBatch
from vicrop.files import safe_name
from vicrop.images import load_image
from vicrop.loaded import load_chosen
from vicrop.plots import finding_figure, save_figure


def ask(image_path: str, question: str, choice: ModelChoice, how: MethodChoice, folder: Path) -> None:
    """Print both answers about one picture, and draw what each method looked at into a folder.

    Raises:
        ValueError, OSError: an empty question; an image that cannot be read; a model that cannot be loaded.
    """
    if not question.strip():
        raise ValueError(f"the question must be a text that is not empty, got {question!r}")
    image = load_image(image_path)
    loaded = load_chosen(choice, how)
    if hasattr(loaded.model.config, "reads"):  # an embedded model
        print(f"{choice.name} {loaded.model.config.reads}")
    batch = QuestionBatch(loaded.session([image]), [question], crop_below=how.crop_below)
    original = batch.original_answers(loaded.methods)
    folder.mkdir(parents=True, exist_ok=True)
    for name, method in loaded.methods.items():
        (found,) = batch.results(method, original)
        path = folder / f"{Path(image_path).stem}-{safe_name(choice.name)}-{name}.png"
        save_figure(finding_figure(image, question, name, found), path)
        boxes = f"{'box' if len(found.bboxes) == 1 else 'boxes'} {', '.join(map(str, found.bboxes))}"
        what = "no crop, the first answer is sure enough" if found.gated else boxes
        print(f"{name}: {what}, drawn in {path}")
        sure = {when: f"p {p:.2f}" for when, p in found.confidence.items()}
        print(f"  without crop: {found.original_answer} ({sure['original']})")
        with_crops = "with crop:  " if len(found.bboxes) < 2 else f"with {len(found.bboxes)} crops:"
        print(f"  {with_crops}  {found.crop_answer} ({sure['crop']})")
