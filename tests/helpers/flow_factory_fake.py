"""As much of Flow-Factory as AGSM's trainers touch, under its names and call signatures."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

PROMPTS = ["a cat", "a dog", "a cat", "a dog", "a cow", "a cow"]


class Adapter:
    """A linear model that is told the prompt, with `forward` and encoders as SD3.5's adapter."""

    preprocessing_modules, inference_modules = ["text_encoders", "vae"], ["transformer", "vae"]

    def __init__(self):
        self.transformer = nn.Linear(4 + 3, 4)
        self.trainable_components = [self.transformer]
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.moves = []

    def forward(
        self, t, latents, prompt_embeds, pooled_prompt_embeds, guidance_scale=7.5, t_next=None,
        next_latents=None, noise_level=None, compute_log_prob=True, return_kwargs=("noise_pred",),
    ):  # fmt: skip
        assert guidance_scale == 1.0 and not compute_log_prob
        if next_latents is None:
            torch.randn(1)  # the scheduler draws a sample
        text = prompt_embeds.mean(1) + pooled_prompt_embeds
        return SimpleNamespace(noise_pred=self.transformer(torch.cat([latents, text], 1)))

    def preprocess_func(self, prompt, **options):
        assert options["guidance_scale"] == 1.0
        rows = [draw(len(text) + 1, 3, 3) for text in prompt]
        return {
            "prompt_embeds": torch.stack([one[:2] for one in rows]),
            "pooled_prompt_embeds": torch.stack([one[2] for one in rows]),
            "prompt_ids": torch.zeros(len(prompt), 2),
        }

    def on_load_components(self, components, device):
        self.moves.append(("on", components))

    def off_load_components(self, components):
        self.moves.append(("off", components))


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def samples(adapter):
    """A rollout: prompts, embeddings, the latents' last states and the advantages 0, 1, 2, ..."""
    made = []
    for number, prompt in enumerate(PROMPTS):
        text = adapter.preprocess_func([prompt], guidance_scale=1.0)
        made.append(
            SimpleNamespace(
                prompt=prompt,
                all_latents=draw(number, 2, 4),
                extra_kwargs={"advantage": torch.tensor(float(number))},
                **{name: value[0] for name, value in text.items()},
            )
        )
    return made


@dataclass(kw_only=True)
class Arguments:
    """As Flow-Factory's, a mapping for `**` too."""

    learning_rate: float = 0.1
    guidance_scale: float = 4.5
    extra_kwargs: dict = field(default_factory=dict)

    def __post_init__(self):
        assert self.learning_rate

    def keys(self):
        return [one.name for one in fields(self)]

    def __getitem__(self, name):
        return getattr(self, name)


class Trainer:
    """The loop that the three trainers have: micro-steps, then the optimizer's step."""

    micro_steps = 4  # two to a step

    def __init__(self, accelerator, config, adapter):
        self.accelerator, self.config, self.adapter = accelerator, config, adapter
        self.training_args = config.training_args
        self.step, self.logged = 0, []
        self.optimizer = accelerator.prepare(
            torch.optim.SGD(adapter.transformer.parameters(), self.training_args.learning_rate)
        )

    def log_data(self, data, step):
        self.logged.append((step, data))

    def optimize(self, samples):
        for _ in range(self.micro_steps):
            with self.accelerator.accumulate(self.adapter.transformer):
                inputs = torch.cat([torch.randn(2, 4), torch.zeros(2, 3)], 1)
                self.accelerator.backward(self.adapter.transformer(inputs).pow(2).mean())
                if self.accelerator.sync_gradients:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    self.log_data({"train/loss": 0.0}, step=self.step)
                    self.step += 1

    def save_checkpoint(self, save_directory, epoch=None):
        folder = Path(save_directory) / ("" if epoch is None else f"checkpoint-{epoch}")
        folder.mkdir(parents=True)

    def load_checkpoint(self, path, resume_type=None):
        assert Path(path).exists()


class PairTrainer(Trainer):
    """DPO's: every other sample is a pair's chosen one."""

    def optimize(self, samples):
        self._align_dpo_pairs_across_ranks(list(zip(samples[1::2], samples[::2], strict=True)))
        super().optimize(samples)

    def _align_dpo_pairs_across_ranks(self, pairs):
        return pairs


def reduce_loss_info(accelerator, loss_info):
    return {name: torch.stack(values).mean() for name, values in loss_info.items()}


def modules():
    """The fake's modules by name, for `sys.modules`."""
    kinds = ("GRPO", "NFT", "DPO")
    contents = {
        "flow_factory": {"__path__": []},
        "flow_factory.hparams": {f"{kind}TrainingArguments": Arguments for kind in kinds},
        "flow_factory.trainers": {"__path__": []},
        "flow_factory.trainers.grpo": {"GRPOTrainer": Trainer},
        "flow_factory.trainers.nft": {"DiffusionNFTTrainer": Trainer},
        "flow_factory.trainers.dpo": {"DPOTrainer": PairTrainer},
        "flow_factory.utils": {"__path__": []},
        "flow_factory.utils.dist": {"reduce_loss_info": reduce_loss_info},
    }
    made = {}
    for name, content in contents.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(content)
    return made


def trainer(kind, resume_path=None, resume_type=None, **options):
    """A trainer by a class of ours, made as Flow-Factory's loader makes it."""
    torch.manual_seed(0)
    config = SimpleNamespace(
        training_args=kind(**options),
        model_args=SimpleNamespace(resume_path=resume_path, resume_type=resume_type),
        data_args=SimpleNamespace(enable_preprocess=True),
    )
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    make = kind if hasattr(kind, "trainer") else Trainer
    return make(config=config, accelerator=accelerator, adapter=Adapter())


def weights(made):
    return [one.detach().clone() for one in made.adapter.transformer.parameters()]
