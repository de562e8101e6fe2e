"""AGSM in Flow-Factory's trainers: on stand-ins for its classes, and in itself where it is."""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

import flow_factory_fake as fake
import numpy as np
import pytest
import readme
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from pipelines_tiny import speaking_pipeline

NAME = "agsm_loss.integrations.hosts.flow_factory"
KINDS = ["AGSMGRPO", "AGSMNFT", "AGSMDPO"]
HAS_FLOW_FACTORY = find_spec("flow_factory") is not None


def imported(monkeypatch, others):
    """Our module, as it is where `others` are in the place of Flow-Factory's modules."""
    for name in [one for one in sys.modules if one.partition(".")[0] == "flow_factory"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    for name, module in others.items():
        monkeypatch.setitem(sys.modules, name, module)
    module = importlib.import_module(NAME)
    del sys.modules[NAME]  # it is of this test alone
    return module


@pytest.fixture
def ours(monkeypatch):
    return imported(monkeypatch, fake.modules())


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    forget_accelerate()


def forget_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def optimized(kind, micro_steps=4, **options):
    made = fake.trainer(kind, **options)
    made.micro_steps = micro_steps
    made.optimize(fake.samples(made.adapter))
    return made


def seen_batches(ours, monkeypatch):
    seen, agsm_on = [], ours.agsm_on

    def record(batch, *args):
        seen.append(batch)
        return agsm_on(batch, *args)

    monkeypatch.setattr(ours, "agsm_on", record)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_without_weight_it_is_the_frameworks_trainer_bit_for_bit(kind, ours):
    made, plain = optimized(getattr(ours, kind), agsm_weight=0.0), optimized(fake.Arguments)
    assert all(map(torch.equal, fake.weights(made), fake.weights(plain)))
    assert made.agsm.step == 2 and made.agsm.calls == 0
    assert [list(data) for _, data in made.logged] == [["train/loss"]] * 2


def test_the_term_is_in_the_loss_and_grows_with_lambda(ours):
    """One step of SGD without momentum is linear in λ."""
    host, one, two = (
        torch.cat([p.flatten() for p in fake.weights(made)])
        for made in (optimized(ours.AGSMNFT, 2, agsm_weight=weight) for weight in (0.0, 1.0, 2.0))
    )
    assert (one - host).norm() > 1e-3
    torch.testing.assert_close(two - host, 2 * (one - host), rtol=1e-4, atol=1e-6)


def test_lambda_warms_up(ours):
    made = optimized(ours.AGSMGRPO, agsm_warmup_steps=2)
    logged = [data["agsm/weight"].item() for _, data in made.logged if "agsm/weight" in data]
    assert logged == [0.5]  # none in step 0


@pytest.mark.parametrize("kind", KINDS)
def test_it_logs_moves_the_ema_and_leaves_the_hosts_draws(kind, ours):
    optimized(ours.AGSMNFT, agsm_weight=0.0)
    host = torch.get_rng_state()
    made = optimized(getattr(ours, kind), agsm_ema_decay=0.5)
    assert torch.equal(torch.get_rng_state(), host)
    terms = [(step, data) for step, data in made.logged if "agsm/loss" in data]
    assert [step for step, _ in terms] == [0, 1]
    assert all(data["agsm/loss"] > 0 and data["agsm/weight"] == 1 for _, data in terms)
    torch.manual_seed(0)
    started = [one.detach() for one in fake.Adapter().transformer.parameters()]
    for first, average, last in zip(started, made.agsm.ema.shadow, fake.weights(made), strict=True):
        assert not torch.equal(average, first) and not torch.equal(average, last)


@pytest.mark.parametrize("kind", KINDS)
def test_its_images_are_the_best_or_the_chosen_ones(kind, ours, monkeypatch):
    seen = seen_batches(ours, monkeypatch)
    best = {} if kind == "AGSMDPO" else {"agsm_best": 0.5}
    made = optimized(getattr(ours, kind), agsm_batch=2, **best)
    rows = [1, 3, 5] if kind == "AGSMDPO" else [3, 4, 5]
    rollout = fake.samples(made.adapter)
    shown = set()
    for batch in seen:
        for latents, caption, text in zip(
            batch.latents, batch.captions, batch.conditioning["prompt_embeds"], strict=True
        ):
            (row,) = (r for r in rows if torch.equal(rollout[r].all_latents[-1], latents))
            assert caption == rollout[row].prompt
            assert torch.equal(text, rollout[row].prompt_embeds)
            shown.add(row)
    assert len(seen) == 4 and shown == set(rows)
    assert len({tuple(batch.timesteps.tolist()) for batch in seen}) == 4


def test_the_empty_caption_competes(ours, monkeypatch):
    seen = seen_batches(ours, monkeypatch)
    made = optimized(ours.AGSMNFT, agsm_batch=1, agsm_timestep_low=0.8)
    empty = made.adapter.preprocess_func([""], guidance_scale=1.0)
    for batch in seen:
        assert len(batch.captions) == 1 and 800 <= batch.timesteps.item() < 1000
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            assert torch.equal(batch.null[name], empty[name])
    (last,) = (data for step, data in made.logged if step == 1 and "agsm/loss" in data)
    assert last["agsm/chance_weight"] == 0.5  # two captions
    more = optimized(ours.AGSMNFT, agsm_batch=6, agsm_best=1.0, agsm_num_negatives=1)
    (last,) = (data for step, data in more.logged if step == 1 and "agsm/loss" in data)
    assert last["agsm/chance_weight"] == pytest.approx(1 / 3)
    assert [where for where, _ in made.adapter.moves] == ["on", "off", "on"]


def test_a_checkpoint_holds_the_ema(ours, tmp_path):
    made = optimized(ours.AGSMDPO, agsm_ema_decay=0.5)
    made.save_checkpoint(str(tmp_path), epoch=3)
    folder = str(tmp_path / "checkpoint-3")
    resumed = fake.trainer(ours.AGSMDPO, resume_path=folder, agsm_ema_decay=0.5)
    later = fake.trainer(ours.AGSMDPO, agsm_ema_decay=0.5)
    later.load_checkpoint(folder, "lora")
    for other in (resumed, later):
        assert all(map(torch.equal, other.agsm.ema.shadow, made.agsm.ema.shadow))
        assert other.agsm.step == 2 and other.agsm.calls == 4
    without = fake.trainer(ours.AGSMDPO, resume_path=str(tmp_path))  # a checkpoint without AGSM
    assert without.agsm.step == 0
    with pytest.raises(ValueError, match="resume_type: expected lora or full, got state"):
        fake.trainer(ours.AGSMDPO, resume_path=folder, resume_type="state")


class Missing:
    """Finds no Flow-Factory, as where it is not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "flow_factory":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_missing_framework_or_another_layout_is_named(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    with pytest.raises(ImportError, match=r"got none\. .*git checkout \w{40} && pip install"):
        imported(monkeypatch, {})
    others = fake.modules()
    del others["flow_factory.trainers.nft"]
    with pytest.raises(ImportError, match=r"another layout: .*flow_factory\.trainers\.nft"):
        imported(monkeypatch, others)


def test_a_trainer_that_agsm_cannot_join_is_named(ours):
    with pytest.raises(RuntimeError, match="no step that AGSM could join"):
        optimized(ours.AGSMGRPO, micro_steps=0)
    made = fake.trainer(ours.AGSMDPO)
    made._align_dpo_pairs_across_ranks = lambda pairs: pairs  # upstream's, renamed
    with pytest.raises(RuntimeError, match="names no images for AGSM"):
        made.optimize(fake.samples(made.adapter))


def test_a_model_that_needs_more_than_its_prompt_is_named(ours, monkeypatch):
    def forward(self, t, latents, prompt_embeds, img_ids, guidance_scale=1.0):
        raise NotImplementedError

    monkeypatch.setattr(fake.Adapter, "forward", forward)
    with pytest.raises(ValueError, match=r"sd3-5.*got a Adapter, which needs \['img_ids'\]"):
        fake.trainer(ours.AGSMGRPO)


@pytest.mark.parametrize(
    "options",
    [
        {"agsm_weight": -1.0},
        {"agsm_best": 0.0},
        {"agsm_batch": 1, "agsm_num_negatives": 1},
        {"agsm_num_negatives": -1},
        {"agsm_guidance_scale": 0.5},
        {"agsm_timestep_low": 1.0},
        {"agsm_warmup_steps": -1},
    ],
)
def test_options_out_of_range_are_named(options, ours):
    with pytest.raises(ValueError, match=rf"{next(iter(options))}: expected"):
        ours.AGSMGRPO(**options)


def test_the_guides_yaml_names_every_option_and_its_default(ours):
    (block,) = readme.blocks("integrations/hosts/README.md", "yaml")
    shown = yaml.safe_load(block.text)["train"]
    path = shown.pop("trainer_type")
    defaults = ours.RolloutArguments.__dataclass_fields__
    assert path.rpartition(".")[0] == NAME and hasattr(ours, path.rpartition(".")[2])
    assert shown == {name: one.default for name, one in defaults.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow_factory")
    speaking_pipeline("sd3", folder)
    (folder / "train.txt").write_text("a red circle\ntwo blue circles\na blue square\na cat\n")
    return folder


def run(folder, trainer_type, dynamics, **options):
    """Two epochs of Flow-Factory on the CPU; the trainer and what it logged."""
    from flow_factory.hparams import Arguments
    from flow_factory.rewards.abc import PointwiseRewardModel, RewardModelOutput
    from flow_factory.trainers.loader import load_trainer

    class Redness(PointwiseRewardModel):
        required_fields, use_tensor_inputs = ("prompt", "image"), False

        def __call__(self, prompt, image=None, **_):
            red = [float(np.asarray(one.convert("RGB"), float)[..., 0].mean()) for one in image]
            return RewardModelOutput(rewards=torch.tensor(red), extra_info={})

    sys.modules["tiny_reward"] = ModuleType("tiny_reward")
    sys.modules["tiny_reward"].Redness = Redness
    is_grpo = "grpo" in trainer_type.lower()
    config = {
        "mixed_precision": "no",
        "data": {
            "dataset_dir": str(folder), "cache_dir": str(folder / "cache"),
            "dataloader_num_workers": 0,
        },
        "model": {
            "model_name_or_path": str(folder / "pipeline"), "model_type": "sd3-5",
            "finetune_type": "lora", "lora_rank": 4, "lora_alpha": 8, "target_modules": "default",
            "resume_path": options.pop("resume_path", None),
        },
        "log": {
            "run_name": "tiny", "logging_backend": "none", "save_dir": str(folder),
            "save_freq": 0, "verbose": False,
        },
        "train": {
            "trainer_type": trainer_type, "max_epochs": 2, "resolution": 8,
            "num_inference_steps": 3, "guidance_scale": 1.0, "per_device_batch_size": 2,
            "group_size": 2, "unique_sample_num_per_epoch": 2, "gradient_step_per_epoch": 1,
            "learning_rate": 0.01, "seed": 3, "latent_storage_dtype": "fp32",
            **({} if is_grpo else {"num_train_timesteps": 1}), **options,
        },
        "scheduler": {"dynamics_type": dynamics, **({"sde_steps": [0, 1]} if is_grpo else {})},
        "eval": {"resolution": 8, "eval_freq": 0},
        "rewards": [
            {"name": "red", "reward_model": "tiny_reward.Redness", "device": "cpu"},
        ],
    }  # fmt: skip
    forget_accelerate()
    trainer = load_trainer(Arguments.from_dict(config))
    logged, log = {}, trainer.log_data
    trainer.log_data = lambda data, step: (logged.update(data), log(data, step))
    trainer.start()
    weights = [one.detach().clone() for one in trainer.adapter.get_trainable_parameters()]
    return trainer, weights, logged


@pytest.mark.slow
@pytest.mark.skipif(not HAS_FLOW_FACTORY, reason="Flow-Factory is not installed here")
@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.parametrize(
    ("kind", "dynamics"),
    [("AGSMGRPO", "Flow-SDE"), ("AGSMGRPO", "CPS"), ("AGSMNFT", "ODE"), ("AGSMDPO", "ODE")],
)
def test_in_flow_factory_itself(kind, dynamics, folder):
    ours = f"{NAME}.{kind}"
    _, plain, _ = run(folder, kind.removeprefix("AGSM").lower(), dynamics)
    _, without, logged = run(folder, ours, dynamics, agsm_weight=0.0)
    assert all(map(torch.equal, without, plain)) and "agsm/loss" not in logged
    trainer, weights, logged = run(folder, ours, dynamics, agsm_batch=2, agsm_ema_decay=0.5)
    assert not all(map(torch.equal, weights, plain))
    assert logged["agsm/loss"] > 0 and trainer.agsm.step == trainer.agsm.ema.num_updates == 2
    trainer.save_checkpoint(str(folder / kind))
    again = {"resume_path": str(folder / kind), "max_epochs": 0, "agsm_ema_decay": 0.5}
    resumed, _, _ = run(folder, ours, dynamics, **again)
    assert all(map(torch.equal, resumed.agsm.ema.shadow, trainer.agsm.ema.shadow))
