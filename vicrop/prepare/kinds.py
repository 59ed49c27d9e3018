"""What the fields of official files, and of the records made of them, must be."""

# A field that is optional in other records is not in a released file: pyright takes that for an oversight.
# pyright: reportGeneralTypeIssues=false

from typing import Annotated

import msgspec
from msgspec import Meta

from vicrop.dataset import Id, Question, Text
from vicrop.evaluation.option_letters import choices, option_of


class ByNumber(msgspec.Struct):
    """The ids in the datasets about COCO's images."""

    question_id: Id
    image_id: Annotated[int, Meta(ge=0, description="{} is a whole number")]


class ByName(msgspec.Struct):
    """The ids in the other datasets."""

    question_id: Id
    questionId: Id  # noqa: N815 (DocVQA's name)
    dataset_id: Id
    image_id: Text
    imageId: Id  # noqa: N815 (GQA's name)


class Listed(Question, kw_only=True):
    """A record with all answers of its annotators."""

    labels: Annotated[
        Annotated[list[str], Meta(min_length=1)], Meta(description="labels are a list of texts that is not empty")
    ]


class Single(Question, kw_only=True):
    """A record with the one right answer."""

    labels: Annotated[str, Meta(pattern=r"\S", description="labels are a text that is not empty")]


class YesOrNo(Single, kw_only=True):
    """A record of POPE: the label is yes or no."""

    labels: Annotated[str, Meta(pattern=r"^(?i:yes|no)\Z", description='labels are "yes" or "no"')]


class Letter(Single, kw_only=True):
    """A record of V*: the label is the letter of an option."""

    category: Text

    def __post_init__(self):
        Question.__post_init__(self)
        choices(self.question, self.labels)


class WithChoices(Listed, kw_only=True):
    """A record of A-OKVQA: also the choices of its multiple choice."""

    choices: Annotated[list[Text] | None, Meta(description="{} are a list of texts")] = None
    correct_choice_idx: Annotated[int | None, Meta(description="{} is the number of a choice")] = None
    difficult_direct_answer: Annotated[bool | None, Meta(description="{} is true or false")] = None

    def __post_init__(self):
        Question.__post_init__(self)
        right = self.correct_choice_idx
        if self.choices is not None and not (right is not None and 0 <= right < len(self.choices)):
            raise ValueError(
                f"correct_choice_idx is the number of a choice (0 to {len(self.choices) - 1}), not {right}"
            )


class WithOptions(Single, kw_only=True):
    """A record of HR-Bench or MME-RealWorld: its options as they are shown; the label is the letter of one."""

    options: Annotated[list[Text], Meta(min_length=2, description="{} are a list of two texts or more")]

    def __post_init__(self):
        Question.__post_init__(self)
        letters = [option_of(line)[0] for line in self.options]
        if self.labels not in letters:
            raise ValueError(f"labels are the letter of an option ({', '.join(letters)}), not {self.labels!r}")


class Phrase(Question, kw_only=True):
    """A record of RefCOCO: a phrase, the box that it means, and its mask, if that is known."""

    prompt: Text
    gt_bbox: list[float]
