"""Rewards by name: models on tiny random weights, packages that are missing, sums with weights."""

import json
import sys
from types import ModuleType, SimpleNamespace

import measures_tiny
import pytest
import torch
from torch import nn

import train_nft
from agsm_loss.integrations.hosts.rollouts import group_advantages
from data.task import Task
from model.pipeline import TextToImage
from rewards import models as reward_models
from rewards import rewards
from rewards import rollout as on_policy
from rewards.models import HPSv2, edit_distance, quoted, readable

TEXTS = ["a photo of a dog", "two red cats"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return measures_tiny.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_names_in_help_are_those_that_are_known():
    told = train_nft.OPTIONS.help_of("reward")
    assert all(name in told for name in rewards.REWARDS)
    assert all(rewards.load(name) for name in ("detector", "redness", "jpeg_compressibility"))


@pytest.mark.parametrize("name", ["pikscore", "redness:0.5,jpeg", "redness;jpeg", ""])
def test_an_unknown_name_is_told_the_known_ones(name):
    with pytest.raises(
        ValueError, match=r"redness, pickscore, .*geneval, package\.module:function"
    ):
        rewards.load(name)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("redness,redness:2", r"once, got 'redness' twice in .*redness:3\."),
        ("redness, jpeg_compressibility ,redness", "once, got 'redness' twice"),
        ("os:sep", r"package\.module:function, got 'os:sep', which is '/'\. Name a function"),
    ],
)
def test_a_reward_is_a_function_and_there_once(name, told):
    for asked in (rewards.check, rewards.load):
        with pytest.raises(ValueError, match=told):
            asked(name)


def test_a_missing_folder_is_found_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(TextToImage, "load", lambda *args: pytest.fail("the model was loaded"))
    missing = tmp_path / "clip"
    for reward, error in (
        (f"redness:2,{missing}", FileNotFoundError),
        ("pikscore", ValueError),
        ("detector", None),
    ):
        flags = ["--reward", reward, "--output_dir", str(tmp_path / "run"), "--rank", "2"]
        with pytest.raises(error or pytest.fail.Exception, match=r"reward:|the model was loaded"):
            train_nft.main(flags)


def test_clip_scores_are_cosines(clip, pixels, monkeypatch):
    monkeypatch.setattr(reward_models, "CLIP", clip)
    monkeypatch.setattr(reward_models, "PICKSCORE", clip)
    score = rewards.load("pickscore")
    ((_, picked),) = score.parts.values()
    with torch.no_grad():
        picked.model.logit_scale.fill_(1.7)
    inputs = picked.processor(
        images=reward_models.to_images(pixels), text=TEXTS, padding=True, return_tensors="pt"
    )
    output = picked.model(**inputs)
    cosines = nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
    assert torch.allclose(score(pixels, TEXTS), torch.tensor(1.7).exp() * cosines, atol=1e-5)
    score = rewards.load("clipscore")
    assert torch.allclose(score(pixels, TEXTS), (100 * cosines).clamp(min=0), atol=1e-3)
    with torch.no_grad():
        score.parts["clipscore"][1].model.visual_projection.weight.neg_()
    assert torch.allclose(score(pixels, TEXTS), (-100 * cosines).clamp(min=0), atol=1e-3)


class OpenCLIPTower(nn.Module):
    """A transformer by open_clip's names, written out."""

    def __init__(self, width, layers, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.resblocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(width),
                    "attn": nn.MultiheadAttention(width, heads, batch_first=True),
                    "ln_2": nn.LayerNorm(width),
                    "mlp": nn.ModuleDict(
                        {"c_fc": nn.Linear(width, 16), "c_proj": nn.Linear(16, width)}
                    ),
                }
            )
            for _ in range(layers)
        )

    def forward(self, x):
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        for block in self.resblocks:
            y = block["ln_1"](x)
            mask = hidden if self.causal else None
            x = x + block["attn"](y, y, y, need_weights=False, attn_mask=mask)[0]
            y = block["mlp"]["c_fc"](block["ln_2"](x))
            x = x + block["mlp"]["c_proj"](y * torch.sigmoid(1.702 * y))
        return x


class OpenCLIP(nn.Module):
    def __init__(self, words):
        super().__init__()
        width, out = 16, 8
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(width))
        self.visual.positional_embedding = nn.Parameter(torch.randn(17, width))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.visual.transformer = OpenCLIPTower(width, 1, 2, causal=False)
        self.visual.proj = nn.Parameter(torch.randn(width, out))
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.randn(64, width))
        self.transformer = OpenCLIPTower(width, 1, 2, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("attn_mask", torch.zeros(64, 64))

    def image(self, x):
        v = self.visual
        x = v.conv1(x).flatten(2).mT
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        return v.ln_post(v.transformer(v.ln_pre(x))[:, 0]) @ v.proj

    def text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.ln_final(self.transformer(x))
        return x[torch.arange(len(x)), ids.argmax(1)] @ self.text_projection


def test_hps_is_open_clips_model_on_its_weights(clip, pixels, tmp_path):
    torch.manual_seed(1)
    theirs = OpenCLIP(len(measures_tiny.words())).requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "hps.pt")
    ours = HPSv2(base=clip, weights=str(tmp_path / "hps.pt"))
    inputs = ours.processor(
        images=reward_models.to_images(pixels), text=TEXTS, padding=True, return_tensors="pt"
    )
    image, text = theirs.image(inputs["pixel_values"]), theirs.text(inputs["input_ids"])
    expected = nn.functional.cosine_similarity(image, text)
    assert torch.allclose(ours(pixels, TEXTS), expected, atol=1e-5)


def test_image_reward_says_where_it_can_be_used(monkeypatch, pixels):
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(ImportError, match=r"pip install image-reward==1\.5"):
        rewards.load("imagereward")
    package = ModuleType("ImageReward")
    package.load = lambda name, device: SimpleNamespace(
        score=lambda prompt, image: len(prompt) + image.width
    )
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    assert rewards.load("imagereward")(pixels, TEXTS).tolist() == [48.0, 44.0]


def test_ocr_reads_what_is_quoted(monkeypatch, pixels):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match="pip install rapidocr"):
        rewards.load("ocr")
    read = iter([("Hel", "lo W0rld"), None])
    package = ModuleType("rapidocr")
    package.RapidOCR = lambda params: lambda image: SimpleNamespace(txts=next(read))
    monkeypatch.setitem(sys.modules, "rapidocr", package)
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    score = rewards.load("ocr")
    told = score(pixels, ['a sign that says "Hello World"', "“No” on a door"])
    assert told.tolist() == pytest.approx([0.9, 0.0])
    with pytest.raises(ValueError, match="double quotes, got 'a sign'"):
        score(pixels, ["a sign"] * 2)


def test_ocr_reads_a_drawn_text():
    """rapidocr's package has its models, so that this needs no download."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    page = Image.new("RGB", (256, 96), "white")
    ImageDraw.Draw(page).text((20, 30), "Hello World", "black", ImageFont.load_default(32))
    drawn = torch.tensor(np.asarray(page)).permute(2, 0, 1)[None] / 127.5 - 1
    score = rewards.load("ocr")
    assert score(drawn, ['"Hello World"']).tolist() == [1.0]
    assert score(torch.ones(1, 3, 96, 256), ['"Hello World"']).tolist() == [0.0]


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(one, other, distance):
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_what_counts_as_readable():
    assert quoted('a "first" and a "second"') == "first"
    assert readable("NO SMO KING here", "Smoking") == 1.0
    assert readable("smoing", "smoking") == pytest.approx(6 / 7)
    assert readable("something else altogether", "no") == 0.0


def test_a_sum_has_weights_and_tells_its_parts(pixels):
    total = rewards.load("measures_tiny:counted:0.5,redness:2,jpeg_compressibility")
    expected = 0.5 * measures_tiny.counted(pixels, TEXTS) + 2 * rewards.redness(pixels, TEXTS)
    expected += rewards.jpeg_compressibility(pixels, TEXTS)
    assert torch.allclose(total(pixels, TEXTS), expected)
    parts = total.scores(pixels, TEXTS)
    assert list(parts) == ["measures_tiny:counted", "redness", "jpeg_compressibility"]
    assert parts["measures_tiny:counted"].tolist() == [1.0, 2.0]
    alone = rewards.load("measures_tiny:counted:3")
    assert alone(pixels, TEXTS).tolist() == [3.0, 6.0]


@pytest.mark.parametrize("weight", ["-1", "0", "nan", "inf"])
def test_a_weight_that_is_not_above_zero_is_refused(weight):
    for asked in (rewards.check, rewards.load):
        with pytest.raises(ValueError, match=f"above 0, got 'redness:{weight}'.*opposite"):
            asked(f"jpeg_compressibility,redness:{weight}")


def test_what_is_not_finite_is_no_reward(pixels):
    def broken(images, prompts):
        return torch.tensor([1.0, float("nan")])

    score = rewards.Reward({"redness": (1.0, rewards.redness), "broken": (0.5, broken)})
    with pytest.raises(FloatingPointError, match=r"numbers of broken.*\['two red cats'\]"):
        score(pixels, TEXTS)
    with pytest.raises(ValueError, match=r"expected \(3,\) of broken"):
        rewards.Reward({"broken": (1.0, broken)})(pixels[[0, 1, 1]], [*TEXTS, "a"])
    pixels[1, 0, 3, 3] = torch.inf  # a VAE that has overflowed: its picture would be black
    for name in ("jpeg_compressibility", "redness"):
        with pytest.raises(FloatingPointError, match="images: expected finite numbers"):
            rewards.load(name)(pixels, TEXTS)


def test_prompts_are_checked_before_any_is_sampled(monkeypatch, tmp_path):
    ocr = object.__new__(reward_models.OCR)
    ocr.check = quoted
    monkeypatch.setitem(rewards.REWARDS, "ocr", lambda device: ocr)
    cells = [['"a"', '"c"'], ['"b"', "a sign"]]  # each caption of an image may be drawn
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"caption": one}) for one in cells))
    task, options = Task(str(tmp_path / "t.jsonl")), SimpleNamespace(data="table.parquet")
    for name in ("redness", "measures_tiny:counted"):
        on_policy.check_prompts(rewards.load(name), options, task)
    for name, bad in (("redness,ocr", "'a sign'"), ("detector", "embedded world, got '\"a\"'")):
        with pytest.raises(ValueError, match=bad):
            on_policy.check_prompts(rewards.load(name), options, task)
    file = tmp_path / "prompts.txt"
    file.write_text("a circle\na zebra\n")
    options = SimpleNamespace(data="world", sampling_prompts=str(file))
    with pytest.raises(ValueError, match="embedded world, got 'a zebra'"):
        on_policy.check_prompts(rewards.load("detector"), options, None)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_made_of_rewards_is_of_all_processes(processes):
    """Advantages by the standard deviation of all rewards, and the log's mean and deviation."""
    rewards_ = torch.tensor([0.0, 1.0, 5.0, 5.001, 7.0, 7.0, 2.0, 0.0])
    every = group_advantages(rewards_, 2, global_std=True)
    told, found = [], []
    for rank, own in enumerate(rewards_.chunk(processes)):
        policy = object.__new__(on_policy.OnPolicy)
        policy.options = SimpleNamespace(group_size=2, gradient_accumulation_steps=1,
                                         validation_steps=9, max_train_steps=9)  # fmt: skip
        policy.differences = on_policy.Findings("", "")
        policy.micro_steps, policy.at_once = 1, 3
        policy._reward = rewards.Reward({"mean": (2.0, lambda x, _: x.mean((1, 2, 3)) / 2)})
        policy.trained = SimpleNamespace(pipeline=SimpleNamespace(decode_latents=lambda x: x))

        def gather(mine, own=own):
            others = [one.reshape(len(own), *[1] * (mine.ndim - 1)) for one in
                      rewards_.chunk(processes)]  # fmt: skip
            assert torch.equal(mine.flatten(), own)
            return torch.cat(others)

        policy.accelerator = SimpleNamespace(
            gather=gather, device="cpu", num_processes=processes, process_index=rank,
            is_main_process=False,
        )  # fmt: skip
        images = own.reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        scored = policy.rewards(images, ["a"] * len(own), 0)
        assert torch.equal(scored, own)
        found.append(policy.advantages(scored, global_std=True))
        told.append({name: float(value) for name, value in policy.logged.items()})
    assert torch.equal(torch.cat(found), every)
    wanted = {"reward/mean": rewards_.mean(), "reward/std": rewards_.std(unbiased=False)}
    assert told == [{name: float(value) for name, value in wanted.items()}] * processes


def test_prompts_may_be_genevals(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"tag": "single_object", "prompt": "a photo of a dog"}\n')
    options = SimpleNamespace(sampling_prompts=str(tmp_path / "p.jsonl"))
    assert on_policy.prompts_of(options, None) == ["a photo of a dog"]


@pytest.mark.parametrize("name", ["nowhere:function", "measures_tiny:nothing"])
def test_a_function_that_cannot_be_imported_is_named(name):
    with pytest.raises(ValueError, match=r"expected package\.module:name .* PYTHONPATH"):
        rewards.check(name)
