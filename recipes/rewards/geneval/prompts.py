"""GenEval's prompts -> their rows: its generator writes each category by one template."""

from __future__ import annotations

import re
from typing import Any

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse",
    "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80, in its order, as GenEval names them."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
RELATIONS = ("left of", "right of", "above", "below")

_PLURALS = {name + ("es" if name.endswith("s") else "s"): name for name in CLASSES}


def row_of(prompt: str) -> dict[str, Any]:
    """The row of one of GenEval's prompts.

    Raises:
        ValueError: not a prompt of its six templates, of COCO's classes.
    """
    text = prompt.strip().removeprefix("a photo of ")
    number, _, plural = text.partition(" ")
    if number in NUMBERS and plural in _PLURALS:
        name, count = _PLURALS[plural], NUMBERS.index(number)
        return {
            "tag": "counting",
            "include": [{"class": name, "count": count}],
            "exclude": [{"class": name, "count": count + 1}],
            "prompt": prompt,
        }
    parts = re.split(f" ({'|'.join(RELATIONS)}|and) ", text)
    things = [_thing(part, prompt) for part in parts[::2]]
    joints, coloured = parts[1::2], ["color" in thing for thing in things]
    if not joints:
        return {"tag": "colors" if coloured[0] else "single_object", "include": things,
                "prompt": prompt}  # fmt: skip
    if joints == ["and"] and coloured[0] == coloured[1]:
        tag = "color_attr" if coloured[0] else "two_object"
        return {"tag": tag, "include": things, "prompt": prompt}
    if len(joints) == 1 and joints != ["and"]:
        placed, target = things
        return {"tag": "position", "include": [target, placed | {"position": [joints[0], 0]}],
                "prompt": prompt}  # fmt: skip
    raise _unknown(prompt)


def _thing(text: str, prompt: str) -> dict[str, Any]:
    """ "a red car" -> its entry of `include`."""
    article, _, name = text.partition(" ")
    colour, _, rest = name.partition(" ")
    if article not in ("a", "an"):
        raise _unknown(prompt)
    if name in CLASSES:
        return {"class": name, "count": 1}
    if colour in COLOURS and rest in CLASSES:
        return {"class": rest, "count": 1, "color": colour}
    raise _unknown(prompt)


def _unknown(prompt: str) -> ValueError:
    return ValueError(
        f"prompts: expected GenEval's, such as 'a photo of two dogs' or 'a photo of a red car left "
        f"of a cup', of COCO's classes; got {prompt!r}."
    )
