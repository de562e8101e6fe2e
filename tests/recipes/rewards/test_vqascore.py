"""VQAScore and Soft-TIFA on tiny random chat models, against one forward for each question."""

import json
import math

import measures_tiny
import numpy as np
import pytest
import torch
from PIL import Image

import score_images
from data.pictures import to_images
from rewards import rewards, soft_tifa, vqascore
from rewards.metrics import mean_with_interval, pooled_with_interval
from rewards.soft_tifa import Question, questions_of
from rewards.vqascore import VQAScore, answer_tokens

PLACE = {"idefics3": "<image>", "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
TEXT = "user: {place}{question}\nassistant:"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
    "{% if part.type == 'image' %}PLACE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
SPELT = {
    "yes": ["yes", "Yes", "Ġyes", "ĠYes"],
    "two": [
        "two",
        "Two",
        "Ġtwo",
        "ĠTwo",
        "2",
        "Ġ",
    ],  # " 2" has two tokens, as in Qwen
    "no": ["n", "N", "Ġ"],
}
SMALL = {**measures_tiny.SMALL, "num_key_value_heads": 1}


def tokenizer():
    """Qwen's kind, of bytes and few words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    tokens, merges = sorted(ByteLevel.alphabet()), []
    for word in ("yes", "Yes", "two", "Two"):
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            tokens.append(word[: end + 1])
        merges.append(("Ġ", word))
        tokens.append(f"Ġ{word}")
    special = ["<end>", "<image>", "<global-img>", "<fake_token_around_image>",
               "<end_of_utterance>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]  # fmt: skip
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens + special))}
    found = Qwen2Tokenizer(vocab=vocab, merges=merges, pad_token="<end>", eos_token="<end>")
    found.add_special_tokens({"additional_special_tokens": special})
    return found


def idefics3(folder):
    """SmolVLM's first architecture."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    images = Idefics3ImageProcessor(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    words = tokenizer()
    processor = Idefics3Processor(
        images, words, image_seq_len=4, chat_template=TEMPLATE.replace("PLACE", PLACE["idefics3"])
    )
    config = Idefics3Config(
        text_config={**SMALL, "model_type": "llama", "vocab_size": len(words),
                     "pad_token_id": words.pad_token_id},
        vision_config={**measures_tiny.SMALL, "image_size": 32, "patch_size": 8},
        image_token_id=processor.image_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    save(Idefics3ForConditionalGeneration(config), folder)
    processor.save_pretrained(folder)
    return processor


def qwen3_vl(folder):
    """Without the video processor, which needs torchvision."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
    )

    class Processor(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, name, argument):
            pass

    images = Qwen2VLImageProcessor(min_pixels=1024, max_pixels=1024, patch_size=8)
    words = tokenizer()
    template = TEMPLATE.replace("PLACE", PLACE["qwen3_vl"])
    processor = Processor(images, words, None, chat_template=template)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = Qwen3VLConfig(
        text_config={**SMALL, "vocab_size": len(words), "head_dim": 8, "rope_parameters": rope,
                     "pad_token_id": words.pad_token_id},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                       "patch_size": 8, "out_hidden_size": 16, "num_position_embeddings": 16,
                       "deepstack_visual_indexes": [0]},
        **{f"{name}_token_id": words.convert_tokens_to_ids(f"<|{token}|>")
           for name, token in (("image", "image_pad"), ("video", "video_pad"),
                               ("vision_start", "vision_start"), ("vision_end", "vision_end"))},
    )  # fmt: skip
    save(Qwen3VLForConditionalGeneration(config), folder)
    return processor


def save(model, folder):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # so that answers depend on images
                parameter.normal_(std=0.4)
    model.save_pretrained(folder)


@pytest.fixture(scope="module", params=[idefics3, qwen3_vl])
def score(request, tmp_path_factory):
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    processor = request.param(folder)
    with pytest.MonkeyPatch.context() as patch:
        if request.param is qwen3_vl:
            patch.setattr(AutoProcessor, "from_pretrained", lambda name: processor)
        made = VQAScore(str(folder))
    made.folder, made.place = str(folder), PLACE[request.param.__name__]
    return made


@pytest.fixture
def pixels():
    """More than a batch."""
    return torch.rand(11, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def alone(score, image, question, answer):
    """The probability by one forward of one question, unpadded, with the chat written out."""
    text = TEXT.format(place=score.place, question=question)
    inputs = score.processor(text=[text], images=[[image]], return_tensors="pt")
    probable = score.model(**inputs).logits[0, -1].double().softmax(-1)
    vocab = score.processor.tokenizer.get_vocab()
    return float(sum(probable[vocab[token]] for token in SPELT[answer]))


def test_a_batch_has_the_probabilities_of_single_questions(score, pixels):
    asked = [(f"{'Is it so? ' * (i % 4)}{i}", ["yes", "two", "no"][i % 3]) for i in range(11)]
    expected = [alone(score, *pair) for pair in _flat(to_images(pixels), asked)]
    found = score.probabilities(pixels, asked)
    assert found.tolist() == pytest.approx(expected, abs=2e-6)
    question = 'Does this figure show "{two} dogs"? Please answer yes or no.'
    seen = score(pixels, ["{two} dogs"] * 11)
    assert seen.tolist() == pytest.approx(
        [alone(score, image, question, "yes") for image in to_images(pixels)], abs=2e-6
    )
    assert seen.std() > 1e-4  # images matter


def _flat(images, asked):
    return [(image, *pair) for image, pair in zip(images, asked, strict=True)]


def test_spellings_are_geneval_2s(score):
    words = score.processor.tokenizer
    for answer, tokens in (("Yes", SPELT["yes"]), ("two", SPELT["two"]), ("no", SPELT["no"])):
        assert answer_tokens(words, answer) == sorted(words.convert_tokens_to_ids(tokens))


def test_in_bfloat16_and_with_thinking_off(score, pixels, monkeypatch):
    monkeypatch.setattr(score, "model", type(score.model)(score.model.config).bfloat16().eval())
    monkeypatch.setattr(score, "options", {"enable_thinking": False})
    template = score.processor.chat_template + "{{ 'x' if enable_thinking else '' }}"
    monkeypatch.setattr(score.processor, "chat_template", template)
    found = score(pixels[:1], ["a dog"])
    assert found.dtype == torch.float32 and 0 < float(found) < 1


def test_a_mean_over_unequal_prompts():
    values, prompts = [1, 2, 3, 7], ["a", "a", "a", "b"]
    assert pooled_with_interval([5, 6], ["a", "b"]) == mean_with_interval([5, 6], ["a", "b"])
    found = pooled_with_interval(values, prompts)
    deviations = np.array([6 - 3 * 3.25, 7 - 3.25]) / 2  # of the sums, by the mean number
    reach = 12.7062 * np.std(deviations, ddof=1) / math.sqrt(2)
    assert found["score"] == 3.25
    assert found["high"] - 3.25 == pytest.approx(reach, rel=1e-5) == 3.25 - found["low"]


def test_soft_tifa_by_slow_loops():
    rng = np.random.default_rng(0)
    skills = [["count", "object"], ["object"], ["object", "verb", "count"]]
    answers = [rng.random(len(names)).tolist() for names in skills]
    questions = [[Question("", "", name) for name in names] for names in skills]
    found = soft_tifa.soft_tifa(answers, questions, ["a", "b", "c"])
    assert list(found) == ["soft_tifa_am", "soft_tifa_gm", "soft_tifa_count", "soft_tifa_object",
                           "soft_tifa_verb"]  # fmt: skip
    arithmetic = sum(sum(own) / len(own) for own in answers) / 3
    geometric = sum(math.prod(own) ** (1 / len(own)) for own in answers) / 3
    assert found["soft_tifa_am"]["score"] == pytest.approx(arithmetic)
    assert found["soft_tifa_gm"]["score"] == pytest.approx(geometric)
    for skill in ("count", "object", "verb"):
        own = [value for names, values in zip(skills, answers, strict=True)
               for name, value in zip(names, values, strict=True) if name == skill]  # fmt: skip
        assert found[f"soft_tifa_{skill}"]["score"] == pytest.approx(sum(own) / len(own))


def test_a_folder_is_scored_by_a_chat_model(tmp_path, capsys):
    torch.manual_seed(0)
    idefics3(tmp_path / "chat")
    score = rewards.load(str(tmp_path / "chat")).parts[str(tmp_path / "chat")][1]
    score.place = PLACE["idefics3"]
    rows = [
        {"prompt": "two dogs", "vqa_list": [["How many dogs are there?", "two"], ["Any?", "Yes"]],
         "skills": ["count", "object"]},
        {"prompt": "a cat", "vqa_list": [["Is it a cat?", "Yes"]], "skills": ["object"]},
    ]  # fmt: skip
    folder, expected = tmp_path / "a", []
    for i, row in enumerate(rows):
        (folder / f"{i:05d}" / "samples").mkdir(parents=True)
        (folder / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps(row))
        image = Image.new("RGB", (40, 24), ("red", "blue")[i])
        image.save(folder / f"{i:05d}" / "samples" / "0000.png")
        expected.append([alone(score, image, f"{text} Answer in one word.", answer.lower())
                         for text, answer in row["vqa_list"]])  # fmt: skip
    score_images.main(["--images", str(folder), "--vqa", str(tmp_path / "chat")])
    head = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    assert head == ("| | vqascore | soft tifa am | soft tifa gm | soft tifa count "
                    "| soft tifa object |")  # fmt: skip
    lines = [json.loads(line) for line in (folder / "vqa_results.jsonl").read_text().splitlines()]
    for line, row, own in zip(lines, rows, expected, strict=True):
        assert line["prompt"] == row["prompt"]
        assert line["answers"] == pytest.approx(own, abs=2e-6)
    found = json.loads((folder / "scores.json").read_text())["metrics"]
    one, other = expected
    assert found["soft_tifa_gm"]["score"] == pytest.approx((math.prod(one) ** 0.5 + other[0]) / 2)
    assert found["soft_tifa_object"]["score"] == pytest.approx((one[1] + other[0]) / 2)
    assert found["vqascore"]["score"] == pytest.approx(np.mean([a["vqascore"] for a in lines]))


def test_the_reward_has_geneval_2s_model(monkeypatch):
    monkeypatch.setattr(rewards, "VQAScore", lambda name, device: (name, device))
    assert rewards.load("vqascore:2", "cpu").parts["vqascore"] == (2, (vqascore.VQA, "cpu"))
    assert vqascore.VQA == "Qwen/Qwen3-VL-8B-Instruct"


def test_a_model_without_a_chat_template_is_said(tmp_path):
    clip = measures_tiny.clip(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"clip: expected .* a chat template, got none"):
        VQAScore(clip)


@pytest.mark.parametrize(
    "change",
    [{"vqa_list": None}, {"vqa_list": []}, {"vqa_list": [["Any?"]]}, {"vqa_list": [["Any?", 2]]},
     {"skills": None}, {"skills": ["a", "b"]}],
)  # fmt: skip
def test_questions_that_cannot_be_read(change):
    row = {"prompt": "a dog", "vqa_list": [["Any?", "Yes"]], "skills": ["object"]}
    assert questions_of([row]) == [[("Any?", "Yes", "object")]]
    assert questions_of([{"prompt": "a dog"}]) == [[]]
    with pytest.raises(ValueError, match=r"'a dog': expected vqa_list.* and skills.*; got"):
        questions_of([row, row | change])
    with pytest.raises(ValueError, match="expected vqa_list"):
        questions_of([row, {"prompt": "a dog"}])
