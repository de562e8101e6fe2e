"""VQAScore (arXiv 2404.01291): P(yes) when a model is asked whether an image shows a text.

score = VQAScore("Qwen/Qwen3-VL-8B-Instruct")
score(pixels, prompts)                         (N, 3, H, W) in [-1, 1] -> (N,), P(yes)
score.probabilities(pixels, [("How many cows are in the image?", "three")])         P(three)

A probability is that of an answer's first token, summed over the spellings that GenEval 2 sums:
small and with a capital, with a blank before it, a number also in digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.pictures import to_images

VQA = "Qwen/Qwen3-VL-8B-Instruct"
"""GenEval 2's."""
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
AT_ONCE = 8
"""Images in a batch."""


class VQAScore:
    """P(yes) by a model of transformers' `AutoModelForImageTextToText`, in its checkpoint's dtype.

    Args:
        name: a folder or a hub id. Take an instruct model: one that thinks first answers later.

    Raises:
        ImportError: what the model's processor needs is missing, such as torchvision.
        ValueError: its processor has no chat template.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor: Any = AutoProcessor.from_pretrained(name)
        template = getattr(self.processor, "chat_template", None)
        if not template:
            raise ValueError(
                f"{name}: expected a model whose processor has a chat template, got none. Take one "
                "that was trained on instructions, such as Qwen3-VL, SmolVLM or InternVL."
            )
        self.options = {"enable_thinking": False} if "enable_thinking" in str(template) else {}
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
        self.model = model.to(device).eval().requires_grad_(False)

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.probabilities(pixels, [(QUESTION.format(one), "yes") for one in prompts])

    @torch.no_grad()
    def probabilities(self, pixels: Tensor, asked: Sequence[tuple[str, str]]) -> Tensor:
        """(N,) on the CPU: of each image's expected answer.

        pixels: (N, 3, H, W) in [-1, 1]. asked: a question and its answer for each.
        """
        images, found = to_images(pixels), []
        chats = [_chat(image, text) for image, (text, _) in zip(images, asked, strict=True)]
        for start in range(0, len(asked), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            inputs = self.processor.apply_chat_template(
                chats[part],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
                **self.options,
            ).to(self.model.device, self.model.dtype)
            logits = self.model.generate(
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            ).logits[0]
            probable = logits.float().softmax(-1).cpu()
            found += [
                row[answer_tokens(self.processor.tokenizer, answer)].sum()
                for row, (_, answer) in zip(probable, asked[part], strict=True)
            ]
        return torch.stack(found)


def _chat(image: Any, text: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    """The first tokens of an answer's spellings, each once."""
    spellings = {answer, answer.lower(), answer.capitalize()}
    if answer.lower() in NUMBERS:
        spellings.add(str(NUMBERS.index(answer.lower()) + 1))
    texts = [blank + text for text in spellings for blank in ("", " ")]
    return sorted({tokenizer.encode(text, add_special_tokens=False)[0] for text in texts})
