"""Captions as the stock pipelines encode them, and what tells them apart."""

from types import SimpleNamespace

import pytest
import torch
from pipelines_tiny import speaking_pipeline

from agsm_loss.integrations.prompts import caption_ids, encode_prompts, image_conditioning

KINDS = ("unet", "unet_sdxl", "sd3", "flux")


@pytest.fixture(scope="module", params=KINDS)
def pipe(request, tmp_path_factory):
    from diffusers import DiffusionPipeline

    folder = speaking_pipeline(request.param, tmp_path_factory.mktemp(request.param))
    return DiffusionPipeline.from_pretrained(folder)


def test_captions_that_are_encoded_alike_are_one_caption(pipe):
    """Cut off at the encoder's limit; blanks dropped, where every tokenizer drops them; padding."""
    tokenizers = [part for name, part in pipe.components.items() if "tokenizer" in name]
    longest = max(part.model_max_length for part in tokenizers)
    long = " ".join(["two red circles"] * min(longest, 600))
    texts = [long, f"{long} and a cat", "two red circles", "two blue circles", "", "  "]
    texts += ["a", *(f"a{part.eos_token}" for part in tokenizers)]  # CLIP pads with it
    ids = caption_ids(pipe, texts)
    rows = encode_prompts(pipe, texts)["prompt_embeds"]
    for i, one in enumerate(ids):
        for j, other in enumerate(ids):
            if not {"", "  "} & {texts[i], texts[j]}:  # SDXL's empty one is zeros
                alike = torch.allclose(rows[i], rows[j], atol=1e-6)
                assert (one == other) == alike, (texts[i][:20], texts[j][:20])
    assert ids[4] == ids[5] == ""


@pytest.mark.unchecked_shapes
def test_captions_are_texts_read_once(pipe):
    texts = ["a cat", "", "two cats"]
    assert caption_ids(pipe, iter(texts)) == caption_ids(pipe, texts)
    for name, rows in encode_prompts(pipe, iter(texts)).items():
        assert torch.equal(rows, encode_prompts(pipe, texts)[name])
    for call in (caption_ids, encode_prompts):
        with pytest.raises(TypeError, match=r'expected texts, got None\. A dropped one is ""'):
            call(pipe, ["a cat", None])


@pytest.mark.parametrize("kind", ["sana", "flux2", "klein", "z_image"])
def test_ids_are_of_what_the_pipeline_makes_of_a_caption(kind, tmp_path):
    """Sana lower-cases it; the others put it into a chat, which counts towards the limit."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(speaking_pipeline(kind, tmp_path))
    long = "two red circles and a blue square"
    texts = ["two red", "Two RED ", "two reds", "", *(long[:i] + "x" for i in range(6, 30))]
    ids = caption_ids(pipe, texts, max_sequence_length=24)
    encoded = encode_prompts(pipe, texts, max_sequence_length=24).values()
    for i, one in enumerate(ids):
        for j, other in enumerate(ids):
            alike = all(torch.allclose(rows[i], rows[j], atol=1e-6) for rows in encoded)
            assert (one == other) == alike, (texts[i], texts[j])
    assert (ids[0] == ids[1]) == (kind == "sana") and ids[3] == ""
    assert len(set(ids)) < len(ids) - 2


def test_a_tokenizer_without_its_encoder_tells_nothing_apart(tmp_path):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(speaking_pipeline("sd3", tmp_path))
    texts = ["two red circles " * 2, "two red circles " * 2 + "cat"]
    assert len(set(caption_ids(pipe, texts, max_sequence_length=16))) == 2
    pipe.text_encoder_3 = None
    assert len(set(caption_ids(pipe, texts, max_sequence_length=16))) == 1
    with pytest.raises(TypeError, match="Wrap it"):
        caption_ids(pipe, "a cat")
    with pytest.raises(TypeError, match="expected one with a tokenizer"):
        caption_ids(SimpleNamespace(components={}, encode_prompt=pipe.encode_prompt), ["a cat"])


def test_the_empty_caption_is_what_the_pipeline_guides_away_from(pipe):
    [empty] = encode_prompts(pipe, [""])["prompt_embeds"]
    zeros = pipe.config.get("force_zeros_for_empty_prompt", False)
    assert bool(empty.any()) != zeros
    with pytest.raises(TypeError, match="Wrap it"):
        encode_prompts(pipe, "a cat")


def test_image_conditioning_has_a_row_an_image(pipe):
    given = image_conditioning(pipe, 3, 16, 8)
    kind = type(pipe).__name__
    assert {n: tuple(v.shape) for n, v in given.items()} == {
        "StableDiffusionXLPipeline": {"add_time_ids": (3, 6)}, "FluxPipeline": {"guidance": (3,)},
    }.get(kind, {})  # fmt: skip


def test_a_tokenizer_inside_a_processor_is_found(pipe):
    """FLUX.2-dev's, whose real processor needs torchvision."""
    told, wanted = ["a cat", "two  cats", ""], caption_ids(pipe, ["a cat", "two  cats", ""])
    parts = {
        name: SimpleNamespace(tokenizer=part) if "tokenizer" in name else part
        for name, part in pipe.components.items()
    }
    held = SimpleNamespace(components=parts, encode_prompt=pipe.encode_prompt)
    assert caption_ids(held, told) == wanted
