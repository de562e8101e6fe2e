"""train_flow_grpo.py and train_nft.py: resume, prompts, rewards, either kind of image, refusals."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from pipelines_tiny import speaking_pipeline
from recipe_runs import killing, log, trained

import train_agsm
import train_flow_grpo
import train_nft
from agsm_loss._random import draws
from agsm_loss.integrations.hosts import rollouts
from agsm_loss.integrations.hosts.dynamics import Dynamics
from data.task import open_task
from lab.world.captions import caption
from lab.world.prompts import specs
from lab.world.scene import TAGS
from model.families import image_side
from model.pipeline import TextToImage
from model.trained import TrainedModel
from rewards import rewards
from rewards import rollout as on_policy

FEW = ["--rank", "2", "--num_tokens", "2", "--validation_per_category", "1", "--group_size", "2",
       "--validation_inference_steps", "1", "--num_inference_steps", "3",
       "--candidates", "empty,in_batch:1", "--reward", "redness", "--learning_rate", "0.01",
       "--logging_steps", "1", "--checkpointing_steps", "1", "--agsm_batch", "3"]  # fmt: skip
GRPO = ["--max_train_steps", "3", "--train_batch_size", "2", "--train_timesteps", "2",
        "--validation_steps", "9"]  # fmt: skip
# A rollout of 8 images, 4 a micro-step, twice each, in 2 optimizer steps.
NFT = ["--max_train_steps", "4", "--sample_batch_size", "4", "--sample_num_batches_per_epoch", "2",
       "--train_batch_size", "4", "--train_num_inner_epochs", "2", "--validation_steps", "9",
       "--gradient_accumulation_steps", "2"]  # fmt: skip


def train(recipe, model, folder, *flags):
    own = {train_flow_grpo: GRPO, train_nft: NFT}[recipe]
    recipe.main(["--model", str(model), "--output_dir", str(folder), *FEW, *own, *flags])
    return trained(folder)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--candidates", "hard:2"], marks=pytest.mark.slow, id="data"),
        pytest.param(
            ["--agsm_images", "best", "--kl_weight", "0.1", "--sde_type", "cps"], id="best"
        ),
    ],
)
def test_flow_grpo_resumes_and_has_agsm_in_it(flags, flow_base, tmp_path, monkeypatch):
    flags = ["--agsm_weight", "0.5", *flags]
    whole = train(train_flow_grpo, flow_base, tmp_path / "whole", *flags)
    lines = log(tmp_path / "whole")
    assert all(line["agsm/loss"] > 0 and {"reward/mean", "reward/std"} <= line.keys()
               for line in lines)  # fmt: skip
    assert [("kl" in line) for line in lines] == ["--kl_weight" in flags] * 3
    redness = rewards.redness
    monkeypatch.setattr(rewards, "redness", killing(redness, 3))
    with pytest.raises(KeyboardInterrupt):
        train(train_flow_grpo, flow_base, tmp_path / "cut", *flags)
    monkeypatch.setattr(rewards, "redness", redness)
    again = [*flags, "--resume_from_checkpoint", "latest"]
    assert same(whole, train(train_flow_grpo, flow_base, tmp_path / "cut", *again))
    assert log(tmp_path / "cut") == lines


def test_a_lora_with_guidance_in_it_is_a_start(flow_base, tmp_path):
    """The two commands of train_nft.py's first lines."""
    train_agsm.main(
        ["--model", str(flow_base), "--output_dir", str(tmp_path / "agsm"), "--rank", "2",
         "--agsm_guidance_scale", "3", "--max_train_steps", "1", "--validation_steps", "9",
         "--learning_rate", "0.1", "--train_batch_size", "4"]
    )  # fmt: skip
    lora = str(tmp_path / "agsm" / "lora")
    merged = TextToImage.load(str(flow_base), torch.float32)
    merged.merge_lora(lora)
    merged.pipe.save_pretrained(tmp_path / "merged")
    flags = ["--num_tokens", "0", "--max_train_steps", "1"]
    one = train(train_nft, flow_base, tmp_path / "one", *flags, "--merge_lora", lora)
    other = train(train_nft, tmp_path / "merged", tmp_path / "other", *flags)
    without = train(train_nft, flow_base, tmp_path / "without", *flags)
    assert one.keys() == other.keys() == without.keys()
    assert all(torch.allclose(one[k], other[k], atol=1e-5) for k in one)
    assert not all(torch.allclose(one[k], without[k], atol=1e-3) for k in one)


@pytest.mark.usefixtures("fresh_accelerate")
def test_flow_grpo_samples_by_the_dynamics_of_its_options(flow_base, tmp_path, monkeypatch):
    seen, sampled = [], rollouts.sample_sde

    def watching(*args, **kwargs):
        trajectory = sampled(*args, **kwargs)
        seen.append(trajectory.dynamics)
        return trajectory

    monkeypatch.setattr(rollouts, "sample_sde", watching)
    flags = ["--max_train_steps", "1", "--sde_type", "cps", "--mixed_precision", "bf16"]
    train(train_flow_grpo, flow_base, tmp_path / "default", *flags)
    assert log(tmp_path / "default")[0]["grpo/approx_kl"] == 0  # sampled as it is trained
    train(train_flow_grpo, flow_base, tmp_path / "given", *flags, "--noise_level", "0.5")
    assert seen == [Dynamics("cps", 0.8), Dynamics("cps", 0.5)]
    with pytest.raises(ValueError, match="noise_level: expected above 0 and at most 1 for cps"):
        train(train_flow_grpo, tmp_path / "absent", tmp_path / "no", *flags, "--noise_level", "1.5")


@pytest.mark.parametrize(
    ("base", "images", "place"),
    [("flow", "data", "start"), pytest.param("epsilon", "best", "within", marks=pytest.mark.slow)],
)
def test_nft_resumes_within_a_rollout_and_at_its_start(
    base, images, place, request, tmp_path, monkeypatch
):
    """The second rollout begins with micro-step 5, in step 3; micro-step 7 is in step 4."""
    base = request.getfixturevalue(f"{base}_base")
    flags = ["--agsm_weight", "0.5", "--agsm_images", images, "--agsm_warmup_steps", "2"]
    whole = train(train_nft, base, tmp_path / "whole", *flags)
    lines = log(tmp_path / "whole")
    assert [line["agsm/weight"] for line in lines] == [0.0, 0.25, 0.5, 0.5]
    assert lines[0]["reward/mean"] == lines[1]["reward/mean"] != lines[2]["reward/mean"]
    assert lines[1]["nft/old_distance"] > 0 and lines[1]["kl"] > 0 and lines[2]["agsm/loss"] > 0
    sheets = {file.name for file in (tmp_path / "whole" / "sheets").iterdir()}
    assert sheets == {"samples_000004.png", "000004.png"}
    owner, name, call = {
        "start": (rewards, "redness", 3),
        "within": (TrainedModel, "timesteps", 2 * 6 + 1),  # AGSM draws its own, too
    }[place]
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, killing(function, call))
    with pytest.raises(KeyboardInterrupt):
        train(train_nft, base, tmp_path / "cut", *flags)
    monkeypatch.setattr(owner, name, function)
    assert len(log(tmp_path / "cut")) == {"start": 2, "within": 3}[place]
    again = [*flags, "--resume_from_checkpoint", "latest"]
    assert same(whole, train(train_nft, base, tmp_path / "cut", *again))
    assert log(tmp_path / "cut") == lines


@pytest.mark.parametrize("recipe", [train_flow_grpo, train_nft])
def test_the_host_alone_samples_what_it_samples_with_agsm(recipe, flow_base, tmp_path):
    name = {train_flow_grpo: "grpo/loss", train_nft: "nft/loss"}[recipe]
    flags = ["--max_train_steps", "1", "--reward", "redness:2,jpeg_compressibility:0.5"]
    train(recipe, flow_base, tmp_path / "host", *flags)
    train(recipe, flow_base, tmp_path / "both", *flags, "--agsm_weight", "1")
    (host,), (both,) = log(tmp_path / "host"), log(tmp_path / "both")
    assert host[name] == both[name] and host["reward/mean"] == both["reward/mean"]
    assert "agsm/loss" not in host and both["agsm/loss"] > 0
    parts = 2 * host["reward/redness"] + 0.5 * host["reward/jpeg_compressibility"]
    assert host["reward/mean"] == pytest.approx(parts)


@pytest.mark.parametrize("recipe", [train_flow_grpo, train_nft])
def test_prompts_of_a_file_are_sampled_in_groups_without_a_data_set(
    recipe, flow_base, tmp_path, monkeypatch
):
    seen, redness = [], rewards.redness

    def watching(pixels, prompts):
        seen.append((pixels, prompts))
        return redness(pixels, prompts)

    monkeypatch.setattr(rewards, "redness", watching)
    (tmp_path / "prompts.txt").write_text("a red circle\n\ntwo blue squares\n")
    flags = ["--sampling_prompts", str(tmp_path / "prompts.txt"), "--data", "there/is/none",
             "--resolution", "24", "--agsm_weight", "1", "--agsm_images", "best"]  # fmt: skip
    train(recipe, flow_base, tmp_path / "run", *flags)
    prompts = [text for _, texts in seen for text in texts]
    assert set(prompts) == {"a red circle", "two blue squares"}
    assert all(texts[0::2] == texts[1::2] for _, texts in seen)
    # NFT's rollout of 8 is decoded and scored as it is sampled.
    calls, images = {train_flow_grpo: (3, 4), train_nft: (4, 4)}[recipe]
    assert [pixels.shape for pixels, _ in seen] == [(images, 3, 24, 24)] * calls
    first = seen[0][0]
    assert not torch.equal(first[0], first[1])  # each image has noise of its own
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(ValueError, match="expected at least one prompt"):
        train(recipe, flow_base, tmp_path / "none", *flags)


def test_items_are_functions_of_their_number_in_any_process():
    """Of the world: its training prompts, which the micro-steps of a rollout share."""
    options = train_nft.OPTIONS.make(agsm_weight=1.0, candidates="in_batch:1,hard:2")
    task = open_task(options, SimpleNamespace(process_index=0, num_processes=1))
    items = on_policy.PromptBatches(options, task, 3, micro_steps=2, images=4)
    worker = pickle.loads(pickle.dumps(items))
    known = {caption(spec) for tag in TAGS for spec in specs(tag)}
    for index in (0, 1, 7):
        one, other = items[index], worker[index]
        assert one.captions == other.captions and len(one.captions) == 3
        assert set(one.captions) <= known and len(one.images.captions) == 4
        assert torch.equal(one.images.pixels, other.images.pixels)
    assert items[0].captions == items[1].captions != items[2].captions
    assert items[0].images.captions != items[1].images.captions


def test_the_old_policy_samples_and_the_samples_are_trained_on_afresh(
    flow_base, tmp_path, monkeypatch
):
    from agsm_loss.integrations.hosts.diffusion_nft import DiffusionNFT

    seen, call = [], DiffusionNFT.__call__

    def watching(self, latents, advantages, text, timesteps, noise, **more):
        applied = [one.clone() for one in self.old.shadow]
        seen.append((latents, advantages, timesteps, noise, applied))
        return call(self, latents, advantages, text, timesteps, noise, **more)

    monkeypatch.setattr(DiffusionNFT, "__call__", watching)
    train(train_nft, flow_base, tmp_path / "run", "--old_decay_max", "0")
    rollout = [torch.cat([one[0], two[0]]) for one, two in zip(seen[::2], seen[1::2], strict=True)]
    flat = [sorted(x.flatten(1).sum(1).tolist()) for x in rollout]
    assert flat[0] == flat[1] and flat[2] == flat[3] and flat[0] != flat[2]  # two passes each
    assert not torch.equal(seen[0][0], seen[2][0])  # in another order
    for place in (2, 3):
        values = [one[place].flatten()[0].item() for one in seen]
        assert len(set(values)) == len(values)
    advantages = torch.cat([seen[0][1], seen[1][1]])
    assert advantages.sum().abs() < 1e-5 and advantages.std(unbiased=False) <= 1.0001
    still, moved = (seen[0][4], seen[3][4]), (seen[3][4], seen[4][4])
    assert all(torch.equal(a, b) for a, b in zip(*still, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(*moved, strict=True))


def test_the_best_samples_are_those_with_the_best_rewards(flow_base, tmp_path, monkeypatch):
    rollouts, made = [], []
    best, batch = on_policy.OnPolicy.best, on_policy.OnPolicy.agsm_batch

    def rollout(self, latents, captions, values):
        rollouts.append((latents, values))
        return best(self, latents, captions, values)

    def watching(self, prompts, index, samples):
        made.append((index, rollouts[-1], batch(self, prompts, index, samples)))
        return made[-1][-1]

    monkeypatch.setattr(on_policy.OnPolicy, "best", rollout)
    monkeypatch.setattr(on_policy.OnPolicy, "agsm_batch", watching)
    flags = ["--agsm_weight", "1", "--agsm_images", "best", "--agsm_best", "0.5", "--seed", "3"]
    train(train_nft, flow_base, tmp_path / "run", *flags)
    for index, (latents, values), shown in made:
        order = values.argsort(descending=True, stable=True)[:4].sort().values
        generator = draws(3, index, 0, "agsm")
        rows = order[torch.randperm(4, generator=generator)[:3]]
        assert torch.equal(shown.latents, latents[rows])
    assert 1 < len(rollouts) < len(made)  # sent once a rollout
    assert not torch.equal(made[0][2].latents, made[1][2].latents)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--group_size", "3"], "groups of 3"),
        (["--train_batch_size", "3"], "3 a micro-step"),
        (["--gradient_accumulation_steps", "3"], "4 micro-steps"),
        (["--agsm_weight", "1", "--agsm_images", "best", "--candidates", "hard:2"], "agsm_images"),
    ],
)
def test_what_does_not_fit_is_refused(flags, named, flow_base, tmp_path):
    with pytest.raises(ValueError, match=named):
        train(train_nft, flow_base, tmp_path, *flags)


def test_all_of_the_denoiser_can_be_trained(flow_base, tmp_path):
    flags = ["--full", "--rank", "0", "--num_tokens", "0", "--kl_weight", "1"]
    train(train_nft, flow_base, tmp_path, *flags)
    assert (tmp_path / "pipeline" / "transformer").is_dir() and log(tmp_path)[-1]["kl"] > 0


def test_prompts_of_a_file_are_sampled_at_the_models_own_size(tmp_path, monkeypatch):
    """Not at that of the world's images, which are the default data."""
    model, seen = speaking_pipeline("sd3", tmp_path / "model"), []

    def watching(pixels, prompts):
        seen.append(pixels.shape[-1])
        return pixels.mean((1, 2, 3))

    monkeypatch.setattr(rewards, "redness", watching)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    flags = ["--sampling_prompts", str(tmp_path / "prompts.txt"), "--max_train_steps", "1"]
    train(train_flow_grpo, model, tmp_path / "run", *flags)
    assert seen == [image_side(TextToImage.load(str(model), torch.float32).pipe)] != [24]
