"""The chat model `vicrop` of lmms-eval: documents with one image get the answer with the crop, others the plain one.

lmms-eval --model vicrop --model_args pretrained=llava,method=rel_att --tasks textvqa_val
"""

import re
from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from vicrop.adapter import INSTRUCTION, family_constant
from vicrop.checkpoints import default_device, quiet_libraries
from vicrop.choices import MethodChoice, ModelChoice
from vicrop.command_line import CommandParser
from vicrop.crop import QuestionBatch, adapter_of
from vicrop.images import allow_pixels
from vicrop.loaded import load_chosen
from vicrop.options import add_method_options, add_model_options, method_choice, model_choice
from vicrop.plain import answer_about_all, answer_without_image
from vicrop.session import ImageSession

ASKED = re.compile(rf"(.*\S)(\s*{re.escape(INSTRUCTION.removeprefix('{question}').strip())})\s*", re.DOTALL)


def choices_of(pretrained: str, options: dict[str, Any]) -> tuple[ModelChoice, MethodChoice]:
    """What `--model_args` say: options of `vicrop ask`, by the same names; `pretrained` is its --model.

    Raises:
        SystemExit: with one line, as a command; ValueError, OSError: as options.model_choice and method_choice.
    """
    parser = CommandParser("lmms-eval --model vicrop")
    add_method_options(parser)
    add_model_options(parser)
    typed = [f"--{name}={str(value).strip(chr(34) + chr(39))}" for name, value in options.items()]
    given = parser.parse_args([f"--model={pretrained}", *typed])
    how = method_choice(given)
    if len(how.names) > 1:
        raise ValueError(f"method={','.join(how.names)} must be one method: a document has one answer")
    return model_choice(given), how


def asked(messages: Any) -> tuple[str, list]:
    """(text, images) of a document's messages; a ValueError says what else it has."""
    messages = ChatMessages(messages=messages)
    images, videos, sounds = messages.extract_media()
    if videos or sounds:
        raise ValueError(f"it has {len(videos)} videos and {len(sounds)} sounds, and vicrop sees only images")
    turns = [message.role for message in messages.messages if message.role != "system"]
    if turns != ["user"]:
        raise ValueError(f"it must be one message of the user, and is {', '.join(turns) or 'none'}")
    texts = [part.text for message in messages.messages for part in message.content if part.type == "text"]
    return "\n".join(texts).strip(), images


class ViCrop(lmms):
    """See the module. A question is asked as the task words it: within the model's roles, and without an instruction.

    Where a task's text ends with the instruction that the toolkit uses, "Answer the question using a single word or
    phrase.", the general prompt of rel_att and pure_grad ends with it, too, as in the paper. Another instruction there
    belongs to the question's own words, which question_att reads.

    Args:
        pretrained: a name of tables.MODELS, a hub id or a folder.
        device: of lmms-eval's --device; default: the GPU of this process, else the CPU.
        batch_size, max_batch_size: of lmms-eval's command line; documents are asked one at a time in any case.
        options: those of `vicrop ask`: method, layer, loc_heads, crop_below, dtype, prompt, geometry, ...
    """

    is_simple = False

    def __init__(self, pretrained: str = "llava_tiny", device: str | None = None, batch_size: Any = 1,
                 max_batch_size: Any = None, **options: Any):  # fmt: skip
        super().__init__()
        choice, self.how = choices_of(pretrained, options | ({"device": device} if device else {}))
        quiet_libraries()
        allow_pixels(self.how.max_image_pixels)
        state = PartialState(cpu=(device or str(default_device())).startswith("cpu"))  # one process for each GPU
        self.loaded = load_chosen(choice, self.how, state.device)
        self.device = state.device
        self.most, self.own_prompt = choice.max_new_tokens, "prompt" in choice.options
        self.has_instruction = INSTRUCTION in family_constant(adapter_of(choice.name), "PROMPT")
        self.said: set[str] = set()

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answer to each document, in order."""
        answers, plain = [], 0
        for request in tqdm(requests, desc="vicrop", unit="question", disable=self.rank != 0):
            context, messages_of, settings, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            try:
                text, images = asked(messages_of(doc))
                self.say_if_sampled(settings)
                answer = self.answer(text, images, doc, settings.get("max_new_tokens") or self.most)
            except (ValueError, OSError) as error:
                raise ValueError(f"{task}, document {doc_id}: {error}") from error
            if len(images) != 1:
                plain += 1
                self.say_once("a document with several images or none gets the plain answer, without a crop")
            answers.append(up_to(answer, settings.get("until")))
            self.cache_hook.add_partial("generate_until", (context, settings), answers[-1])
        if plain:
            logger.warning(f"{plain} of {len(answers)} documents had several images or none: plain answers")
        return answers

    def answer(self, text: str, images: Sequence[Any], doc: Any, most: int) -> str:
        """The answer with the crop where there is one image; else the plain one.

        Args:
            doc: may tell `id`, `gt_bbox` and `gt_bboxes`, for methods that crop without looking.
            most: an answer has at most so many tokens.
        """
        question, options = self.as_asked(text)
        session = ImageSession(images, self.loaded.model, self.loaded.processor, most, **options)
        prompt = session.adapter.prompt(question)
        if not images:
            return answer_without_image(session, prompt)
        if len(images) > 1:
            return answer_about_all(session, prompt)
        record = {name: doc[name] for name in ("id", "gt_bbox", "gt_bboxes") if name in doc}
        batch = QuestionBatch(session, [question], records=[record], crop_below=self.how.crop_below)
        ((_, method),) = self.loaded.methods.items()
        return batch.results(method, batch.original_answers(self.loaded.methods))[0].crop_answer

    def as_asked(self, text: str) -> tuple[str, dict[str, Any]]:
        """(question, options of the adapter) that together ask a task's text, word for word."""
        options = dict(self.loaded.options)
        if self.own_prompt or not self.has_instruction:
            return text, options
        found = ASKED.fullmatch(text)
        question, instruction = found.groups() if found else (text, "")
        return question, options | {"prompt": f"{{question}}{instruction}"}

    def say_if_sampled(self, settings: dict[str, Any]) -> None:
        """Say that a task's sampling or beams are not followed: answers are greedy."""
        if settings.get("do_sample") or settings.get("temperature") or (settings.get("num_beams") or 1) > 1:
            self.say_once(f"answers are greedy, whatever the task asks for: {settings}")

    def say_once(self, sentence: str) -> None:
        """A warning, the first time."""
        if sentence not in self.said:
            self.said.add(sentence)
            logger.warning(sentence)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not to be had: it scores given answers, and ViCrop gives its own."""
        raise NotImplementedError("vicrop answers questions (generate_until); this task asks for loglikelihood")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not to be had: a question is asked once."""
        raise NotImplementedError("vicrop answers a question in one round (generate_until); this task asks for several")


def up_to(answer: str, ends: str | Sequence[str] | None) -> str:
    """The answer up to the first of the texts that end it for a task."""
    for end in [ends] if isinstance(ends, str) else ends or ():
        answer = answer.partition(end)[0] if end else answer
    return answer.strip()
