"""How a pipeline encodes captions for its denoiser, and the empty one, which it guides away from.

>>> from diffusers import StableDiffusionPipeline
>>> from agsm_loss.integrations.prompts import caption_ids, encode_prompts, image_conditioning
>>> pipe = StableDiffusionPipeline.from_pretrained("recipes/lab/models/epsilon")  # yours
>>> text = encode_prompts(pipe, ["two red circles", "a blue square"])  # as denoisers take it
>>> null = encode_prompts(pipe, [""])  # SDXL: zeros, as in its own guidance
>>> {name: tuple(rows.shape) for name, rows in text.items()}
{'prompt_embeds': (2, 12, 128)}
>>> image_conditioning(pipe, 2, height=24, width=24)  # SDXL's time ids, Flux's scale
{}
>>> first, second = caption_ids(pipe, ["two red circles", "Two  Red Circles"])
>>> first == second
True

Known: Stable Diffusion 1.x and 2.x, SDXL, SD3 and SD3.5, Flux.1, FLUX.2 (dev, klein), Qwen-Image,
Sana, Z-Image, by the public `encode_prompt` of their pipelines.
"""

import inspect
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

Row = dict[str, Tensor]
"""What one item is encoded as."""

# Prompts a pass of the text encoders, always: the last bits of a row depend on how many share its
# pass, and in a resumed run, whose cache is empty, others would.
ENCODED = 8


def encode_prompts(pipe: Any, prompts: Sequence[str], **arguments: Any) -> Row:
    """One row a prompt in every tensor, named as the denoisers take them.

    Qwen-Image's and Z-Image's rows are as long as the longest text. Encode their empty caption with
    the others, and split: `rows = encode_prompts(pipe, [*captions, ""])`, `rows[name][:-1]` and
    `rows[name][-1:]`.

    Args:
        pipe: a pipeline of a known family.
        prompts: at least one. The empty prompt is what the pipeline guides away from: zeros for
            SDXL, where its config has `force_zeros_for_empty_prompt`; " " for Qwen-Image.
        arguments: of the pipeline's `encode_prompt`, e.g. max_sequence_length; others are left out.

    Raises:
        TypeError: a pipeline of another family, one text in place of a list, or None in it.
    """
    prompts = _listed("prompts", prompts)
    # In their own precision: autocast is for the denoiser.
    with torch.no_grad(), torch.autocast(pipe.device.type, enabled=False):
        rows = encoded_rows(pipe, prompts, {"device": pipe.device, **arguments})
        return with_empty(pipe, prompts, joined(rows))


def caption_ids(pipe: Any, captions: Sequence[str], **arguments: Any) -> list[Hashable]:
    """What tells captions apart for the model: their tokens, as far as the encoders read them.

    Equal ones are one caption to `AGSMRegularizer`, whatever their spelling: encoders cut long
    texts, and some lower case or drop blanks. What is encoded as the empty caption is "".

    Args:
        pipe: a pipeline with tokenizers.
        captions: any number of texts.
        arguments: as of `encode_prompts`; max_sequence_length is read.
    """
    captions = _listed("captions", captions)
    known = inspect.signature(pipe.encode_prompt).parameters
    most = arguments.get("max_sequence_length")
    if most is None and "max_sequence_length" in known:
        most = known["max_sequence_length"].default
    # FLUX.2-dev's is inside a processor.
    parts = {name: getattr(part, "tokenizer", part) for name, part in pipe.components.items()}
    named = {name: one for name, one in parts.items() if isinstance(one, PreTrainedTokenizerBase)}
    # SD3 may have a tokenizer whose encoder was left out.
    encoded = [
        one
        for name, one in named.items()
        if parts.get(name.replace("tokenizer", "text_encoder")) is not None
    ]
    tokenizers = encoded or list(named.values())
    if not tokenizers:
        raise TypeError(f"pipe: expected one with a tokenizer, got {type(pipe).__name__}.")
    family = _known_family(pipe) or Family()

    texts = [*dict.fromkeys(captions), ""]

    def tokens(one: Any) -> list[Sequence[int]]:
        # As the pipelines do: CLIP's own limit, max_sequence_length for the others.
        clip = "CLIP" in type(one).__name__
        limit: int = one.model_max_length if clip or not most else most
        rows = family.tokens(pipe, one, texts, limit)
        if any("mask" in name for name in known):
            return rows
        # All are padded to one length and read to its end, and CLIP's padding may be in a text.
        return [_without_padding(row, one.pad_token_id) for row in rows]

    ids = [tuple(map(tuple, row)) for row in zip(*map(tokens, tokenizers), strict=True)]
    found = dict(zip(texts, ids, strict=True))
    return ["" if found[text] == found[""] else found[text] for text in captions]


def _listed(name: str, texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"{name}: expected a list of texts, got one text. Wrap it: [text].")
    listed = list(texts)
    if other := [one for one in listed if not isinstance(one, str)]:
        raise TypeError(f'{name}: expected texts, got {other[0]!r:.60}. A dropped one is "".')
    return listed


def _without_padding(ids: Sequence[int], pad: int | None) -> tuple[int, ...]:
    length = len(ids)
    while length and ids[length - 1] == pad:
        length -= 1
    return tuple(ids[:length])


def image_conditioning(
    pipe: Any, number: int, height: int, width: int, *, guidance: float = 3.5
) -> Row:
    """What the denoiser takes besides, a row for each of `number` images; {} for most.

    SDXL: add_time_ids (N, 6), for uncropped images of height x width pixels. Flux.1-dev and
    FLUX.2-dev: guidance (N,), the distilled guidance scale.

    Raises:
        TypeError: a pipeline of another family.
    """
    rows = family_of(pipe).image_rows(pipe, number, height, width, guidance)
    return {name: value.to(pipe.device) for name, value in rows.items()}


def encoded_rows(pipe: Any, prompts: Sequence[str], arguments: Mapping[str, Any]) -> list[Row]:
    """Each prompt as the text encoders make it, in passes of one size."""
    family, rows = family_of(pipe), []
    size = family.prompts_a_pass
    for first in range(0, len(prompts), size):
        group = list(prompts[first : first + size])
        whole = group + group[-1:] * (size - len(group))
        encoded = family.encode(pipe, whole, arguments)
        # Clones, as a row would keep its whole batch.
        rows += [
            {name: value[row].clone() for name, value in encoded.items()}
            for row in range(len(group))
        ]
    return rows


def joined(rows: Sequence[Row]) -> Row:
    """The rows in one tensor a name; texts of different lengths are padded, masks by zeros."""
    return {n: pad_sequence([row[n] for row in rows], batch_first=True) for n in rows[0]}


def with_empty(pipe: Any, prompts: Sequence[str], encoded: Row) -> Row:
    """Zeros at the empty prompts, in place, for pipelines that guide away from those."""
    if pipe.config.get("force_zeros_for_empty_prompt"):
        for value in encoded.values():
            value[[i for i, text in enumerate(prompts) if text == ""]] = 0
    return encoded


class Family:
    """Stable Diffusion, and what the others have in common with it.

    outputs: which outputs of `encode_prompt` are which conditioning.
    prompts_a_pass: of the text encoders.
    """

    outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0}
    prompts_a_pass = ENCODED

    def encode(self, pipe: Any, prompts: list[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """One row a prompt in every tensor or list.

        arguments: of `encode_prompt`; others are left out.
        """
        known = inspect.signature(pipe.encode_prompt).parameters
        wanted = {
            "prompt": prompts,
            "prompt_2": None,
            "prompt_3": None,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
            **arguments,
        }
        given = {name: value for name, value in wanted.items() if name in known}
        encoded = pipe.encode_prompt(**given)
        return {name: encoded[place] for name, place in self.outputs.items()}

    def tokens(
        self, pipe: Any, tokenizer: Any, texts: list[str], limit: int
    ) -> list[Sequence[int]]:
        """What the text encoder of this tokenizer reads of each text."""
        found: list[Sequence[int]] = tokenizer(texts, truncation=True, max_length=limit).input_ids
        return found

    def image_rows(self, pipe: Any, number: int, height: int, width: int, guidance: float) -> Row:
        """As `image_conditioning`, on the CPU."""
        return {}


class SDXL(Family):
    outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}

    def image_rows(self, pipe: Any, number: int, height: int, width: int, guidance: float) -> Row:
        ids = torch.tensor([[height, width, 0, 0, height, width]])
        return {"add_time_ids": ids.repeat(number, 1).float()}


class SD3(Family):
    outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}


class Flux(Family):
    outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0, "pooled_prompt_embeds": 1}

    def image_rows(self, pipe: Any, number: int, height: int, width: int, guidance: float) -> Row:
        if not pipe.transformer.config.guidance_embeds:  # Flux.1-schnell, FLUX.2-klein
            return {}
        return {"guidance": torch.full((number,), guidance)}


class Flux2(Flux):
    """Texts are messages of a chat, whose template counts towards the length."""

    outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0}

    def tokens(
        self, pipe: Any, tokenizer: Any, texts: list[str], limit: int
    ) -> list[Sequence[int]]:
        if not hasattr(pipe, "system_message"):  # klein
            return super().tokens(pipe, tokenizer, _asked(tokenizer, texts, False), limit)
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        found: list[Sequence[int]] = pipe.tokenizer.apply_chat_template(
            format_input(prompts=texts, system_message=pipe.system_message),
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            padding="max_length",
            truncation=True,
            max_length=limit,
        )["input_ids"]
        return found


class QwenImage(Family):
    """A row is as long as its text. Each is encoded alone: others would change its padding."""

    outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0, "prompt_embeds_mask": 1}
    prompts_a_pass = 1
    EMPTY = " "
    """What its authors guide away from."""

    def encode(self, pipe: Any, prompts: list[str], arguments: Mapping[str, Any]) -> Row:
        texts = [text or self.EMPTY for text in prompts]
        encoded: dict[str, Any] = super().encode(pipe, texts, arguments)
        if encoded["prompt_embeds_mask"] is None:  # diffusers leaves out one that masks nothing
            embeds = encoded["prompt_embeds"]
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            encoded["prompt_embeds_mask"] = mask
        return encoded


class Sana(Family):
    """Prompts follow an instruction to the text encoder, but for the empty one."""

    outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0, "prompt_attention_mask": 1}

    def encode(self, pipe: Any, prompts: list[str], arguments: Mapping[str, Any]) -> Row:
        known = inspect.signature(pipe.__call__).parameters
        names = ("clean_caption", "max_sequence_length", "complex_human_instruction")
        given = {**{name: known[name].default for name in names}, **arguments}
        encoded = super().encode(pipe, prompts, given)
        if "" in prompts:
            empty = torch.tensor([text == "" for text in prompts])
            bare = super().encode(pipe, prompts, {**given, "complex_human_instruction": None})
            for name, value in encoded.items():
                value[empty] = bare[name][empty]
        return encoded

    def tokens(
        self, pipe: Any, tokenizer: Any, texts: list[str], limit: int
    ) -> list[Sequence[int]]:
        known = inspect.signature(pipe.__call__).parameters
        asked = "\n".join(known["complex_human_instruction"].default)
        own = limit + len(tokenizer.encode(asked)) - 2
        plain = pipe._text_preprocessing(texts)
        found = super().tokens(pipe, tokenizer, [asked + text for text in plain], own)
        bare = super().tokens(pipe, tokenizer, [""], limit)[0]
        return [row if text else bare for row, text in zip(found, texts, strict=True)]


class ZImage(Family):
    """Its pipeline has a list of texts, each of its own length; in a tensor they need a mask.

    A text is a message of a chat, whose template counts towards the length.
    """

    def tokens(
        self, pipe: Any, tokenizer: Any, texts: list[str], limit: int
    ) -> list[Sequence[int]]:
        return super().tokens(pipe, tokenizer, _asked(tokenizer, texts, True), limit)

    def encode(self, pipe: Any, prompts: list[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
        encoded = super().encode(pipe, prompts, arguments)
        texts = encoded["prompt_embeds"]
        ones = [torch.ones(len(text), dtype=torch.long, device=text.device) for text in texts]
        return {**encoded, "prompt_embeds_mask": ones}


def _asked(tokenizer: Any, texts: Sequence[str], thinking: bool) -> list[str]:
    """The texts as a user's messages, by the tokenizer's own template."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for text in texts
    ]


_FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(),
    "StableDiffusionXLPipeline": SDXL(),
    "StableDiffusion3Pipeline": SD3(),
    "FluxPipeline": Flux(),
    "Flux2Pipeline": Flux2(),
    "Flux2KleinPipeline": Flux2(),
    "QwenImagePipeline": QwenImage(),
    "SanaPipeline": Sana(),
    "ZImagePipeline": ZImage(),
}


def family_of(pipe: Any) -> Family:
    """The pipeline's family.

    Raises:
        TypeError: none of the known ones.
    """
    found = _known_family(pipe)
    if found is None:
        raise TypeError(
            f"pipe: expected one of {sorted(_FAMILIES)}, got {type(pipe).__name__}. For "
            "another pipeline encode the captions as it does; the denoiser may be any callable "
            "(`agsm_loss.Denoiser`)."
        )
    return found


def _known_family(pipe: Any) -> Family | None:
    names = [kind.__name__ for kind in type(pipe).__mro__]
    return next((_FAMILIES[name] for name in names if name in _FAMILIES), None)
