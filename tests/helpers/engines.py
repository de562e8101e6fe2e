"""What each rank does in the tests of DDP, FSDP2 and DeepSpeed (importable by the spawned ones).

Each check compares with one process that holds the same weights and the same averages: `Alone`.
"""

import copy
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, InBatch, Passes, SoftTokens

B, D, W = 3, 6, 8


class Layer(nn.Module):
    """A linear layer with a LoRA."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(W, W)
        self.down, self.up = nn.Linear(W, 2, bias=False), nn.Linear(2, W, bias=False)

    def forward(self, x):
        return (self.base(x) + self.up(self.down(x))).tanh()


class Net(nn.Module):
    """x_t attends to [caption, soft tokens]; small, but with every part of the real thing."""

    def __init__(self, kind):
        super().__init__()
        self.tokens = SoftTokens(W, num_tokens=2, std=0.5)
        self.query, self.out = nn.Linear(D + 1, W), nn.Linear(2 * W, D)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.calls = 0
        for name, parameter in self.named_parameters():
            trained = {"tokens": "tokens.", "lora": ("tokens.", "layers."), "full": ""}[kind]
            low_rank = kind != "lora" or ".base." not in name
            parameter.requires_grad_(name.startswith(trained) and low_rank)

    def forward(self, noisy, timesteps, conditioning, bank):
        self.calls += 1
        query = self.query(torch.cat([noisy, timesteps.reshape(-1, 1) / 1000], dim=1))
        for layer in self.layers:
            query = layer(query)
        text = torch.cat([conditioning, self.tokens(timesteps, bank)], dim=1)
        mix = (query.unsqueeze(1) * text).sum(-1).softmax(1).unsqueeze(1) @ text
        return self.out(torch.cat([query, mix.squeeze(1)], dim=1).tanh())

    @property
    def trained(self):
        return [p for p in self.parameters() if p.requires_grad]


def batch_of(rank, step=0):
    generator = torch.Generator().manual_seed(10 * rank + step)
    noisy, target = torch.randn(2, B, D, generator=generator)
    timesteps = torch.tensor([10.0, 400.0, 900.0]) + rank
    return noisy, timesteps, target, torch.randn(B, 3, W, generator=generator)


def host_inputs(rank, step=0):
    noisy, timesteps, _, text = batch_of(rank, step)
    return noisy, timesteps, text, torch.zeros(B, dtype=torch.long)


class Engine:
    """A net as an engine runs it: how it is called, run backward, stepped and read."""

    def __init__(self, net):
        self.net = self.module = net
        self.prepare()

    def prepare(self):
        self.optimizer = torch.optim.SGD(self.net.trained, lr=0.3)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self):
        """What is trained, whole."""
        return [p.detach().clone() for p in self.net.trained]

    def gradients(self):
        """Averaged over the ranks, whole."""
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.net.trained]


class DDP(Engine):
    def prepare(self):
        super().prepare()
        self.module = nn.parallel.DistributedDataParallel(self.net)


class FSDP2(Engine):
    def prepare(self):
        from torch.distributed.fsdp import fully_shard

        for layer in self.net.layers:
            fully_shard(layer)
        fully_shard(self.net)
        super().prepare()

    def whole(self, tensors):
        return [one.full_tensor().detach().clone() for one in tensors]

    def values(self):
        self.reshard()
        return self.whole(self.net.trained)

    def gradients(self):
        self.reshard()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.net.trained]
        return self.whole(found)

    def reshard(self):
        for module in [self.net, *self.net.layers]:
            module.reshard()


class Zero(Engine):
    stage: int

    def prepare(self):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        optimizer = torch.optim.SGD(self.net.trained, lr=0.3)
        config = {
            "train_micro_batch_size_per_gpu": B,
            "gradient_clipping": 0.0,
            "zero_optimization": {
                "stage": self.stage,
                "stage3_param_persistence_threshold": 20,  # smaller ones stay gathered
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first
        self.deepspeed = deepspeed
        self.module, *_ = deepspeed.initialize(
            model=self.net, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.parameters = self.net.trained

    def backward(self, loss):
        self.module.backward(loss)

    def step(self):
        self.module.step()

    def values(self):
        sharded = self.stage == 3
        gathered = self.deepspeed.zero.GatheredParameters(self.parameters)
        with gathered if sharded else nullcontext():
            return [p.detach().clone() for p in self.parameters]

    def gradients(self):
        from deepspeed.utils import safe_get_full_grad

        found = [safe_get_full_grad(p) for p in self.parameters]
        return [
            torch.zeros(getattr(p, "ds_shape", p.shape)) if one is None else one.clone()
            for p, one in zip(self.parameters, found, strict=True)
        ]


class Zero1(Zero):
    stage = 1


class Zero2(Zero):
    stage = 2


class Zero3(Zero):
    stage = 3


ENGINES = {"ddp": DDP, "fsdp2": FSDP2, "zero1": Zero1, "zero2": Zero2, "zero3": Zero3}


class Alone:
    """One process with the same weights, and an EMA that follows them."""

    def __init__(self, net, decay=0.5):
        self.net = net
        self.ema = EMA(net, decay=decay)

    def take(self, values):
        for p, value in zip(self.net.trained, values, strict=True):
            p.data.copy_(value)


def apart(ours, theirs):
    """The largest difference of two lists of tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def made(engine, kind, *, first=False, seed=0, decay=0.5):
    """The engine, an EMA of its module, and the same alone. first: the EMA before the engine."""
    torch.manual_seed(seed)
    net = Net(kind)
    torch.manual_seed(0)
    alone = Alone(Net(kind), decay)
    ema = EMA(net, decay=decay) if first else None
    engine = ENGINES[engine](net)
    with torch.no_grad():
        engine.module(*host_inputs(0))  # FSDP2 has the outermost parameters gathered after it
    return engine, ema or EMA(engine.module, decay=decay), alone


@torch.no_grad()
def passes(engine, ema, alone, rank):
    """How far the student's and the EMA's passes are from those alone."""
    x = host_inputs(rank, step=7)
    with ema.applied(), alone.ema.applied():
        average, expected = engine.module(*x), alone.net(*x)
    student = engine.module(*x)
    return {
        "student": apart([student], [alone.net(*x)]),
        "average": apart([average], [expected]),
        "between": apart([average], [student]),
    }


def train(engine, ema, alone, rank, steps):
    for step in range(steps):
        engine.backward(engine.module(*host_inputs(rank, step)).square().mean())
        engine.step()
        ema.update()
        alone.take(engine.values())
        alone.ema.update()


def averages(rank, name, kind, first=False, seed=0):
    """Before an update and after some, and with a host's graph open."""
    engine, ema, alone = made(name, kind, first=first, seed=seed)
    told = {"start": passes(engine, ema, alone, rank)}
    train(engine, ema, alone, rank, 3)
    told["trained"] = passes(engine, ema, alone, rank)

    pred = engine.module(*host_inputs(rank))
    with torch.no_grad(), ema.applied():
        engine.module(*host_inputs(rank, step=5))
    engine.backward(pred.square().mean())
    ranks = range(dist.get_world_size())
    losses = [alone.net(*host_inputs(one)).square().mean() for one in ranks]
    mean = torch.autograd.grad(sum(losses) / len(losses), alone.net.trained)
    told["graph"] = apart(engine.gradients(), mean)
    engine.step()
    alone.take(engine.values())
    told["trained again"] = passes(engine, ema, alone, rank)
    state = ema.state_dict()
    told["state"] = 0.0 if state["shadow"] is None else apart(state["shadow"], alone.ema.shadow)
    return told


CAPTIONS = {
    "alike": [["one", "two", "three"], ["four", "five", "six"]],
    # the second rank's images have fewer rivals, or none
    "fewer": [["one", "two", "three"], ["four", "four", "six"]],
    "none": [["one", "two", "three"], ["four", "four", "four"]],
}


def regularizer(denoiser, ema, backward=None, neg_scale=0.5, **settings):
    passes = Passes(backward=backward, **settings)
    rule = InBatch(2, allow_empty=True)
    loss = AGSMLoss(neg_scale=neg_scale)
    return AGSMRegularizer(denoiser, ema, loss, candidates=rule, passes=passes, seed=0)


def steps(rank, name, kind, captions, immediate=False, reuse=False, chunk_size=None):
    """Two AGSM steps' gradients against the mean over the ranks of one process's; calls made."""
    engine, ema, alone = made(name, kind)
    train(engine, ema, alone, rank, 1)
    backward = engine.backward if immediate else None
    agsm = regularizer(engine.module, ema, backward, chunk_size=chunk_size)
    alone_agsm = regularizer(alone.net, alone.ema)
    told = {"calls": [], "loss": 0.0, "gradient": 0.0, "size": []}
    for step in range(2):
        before = engine.net.calls
        pred = engine.module(*host_inputs(rank, step)) if reuse else None
        out = agsm(*batch_of(rank, step), CAPTIONS[captions][rank], pred=pred)
        if out.loss.requires_grad:
            engine.backward(out.loss)
        told["calls"].append(engine.net.calls - before)
        found = engine.gradients()
        mean = [torch.zeros_like(p) for p in alone.net.trained]
        for one in range(dist.get_world_size()):
            alone_agsm.calls = step
            pred = alone.net(*host_inputs(one, step)) if reuse else None
            loss = alone_agsm(*batch_of(one, step), CAPTIONS[captions][one], pred=pred).loss
            grads = torch.autograd.grad(loss, alone.net.trained, materialize_grads=True)
            mean = [m + g / dist.get_world_size() for m, g in zip(mean, grads, strict=True)]
            if one == rank:
                told["loss"] = max(told["loss"], abs(float(out.loss.detach() - loss.detach())))
        told["gradient"] = max(told["gradient"], apart(found, mean))
        engine.step()
        alone.take(engine.values())
        told["size"].append(max(float(g.abs().max()) for g in mean))
    return told


def many(rank, cases):
    """Each case in turn; an error ends them, as the ranks may then wait for each other."""
    told = {}
    for label, (function, arguments, settings) in cases.items():
        try:
            told[label] = function(rank, *arguments, **settings)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            told[label] = f"failed: {type(error).__name__}: {error}"
            break
    return told


def drawn_apart(rank, name):
    """The EMA is made before the engine, and the ranks have drawn other weights."""
    try:
        engine, ema, alone = made(name, "full", first=True, seed=rank)
        train(engine, ema, alone, rank, 2)
        return passes(engine, ema, alone, rank)
    except RuntimeError as error:
        return str(error)


def reference(rank, name):
    """What was given, after training, as `EMA(module, decay=1.0).applied`."""
    engine, ema, alone = made(name, "full", decay=1.0)
    start = copy.deepcopy(alone.net)
    train(engine, ema, alone, rank, 2)
    x = host_inputs(rank)
    with torch.no_grad(), ema.applied():
        given = apart([engine.module(*x)], [start(*x)])
    return {"given": given, "moved": apart(engine.values(), start.trained)}


def saved(rank, name, path):
    engine, ema, alone = made(name, "full")
    train(engine, ema, alone, rank, 2)
    state = ema.state_dict()
    if rank == 0:
        torch.save(state, path)
        return apart(state["shadow"], alone.ema.shadow)
    return state["shadow"] is None


def loaded(rank, name, path):
    """The averages' pass from a state of any number of ranks, and one process's from it."""
    engine, ema, alone = made(name, "full")
    state = torch.load(path)
    ema.load_state_dict(state)
    alone.ema.load_state_dict(state)
    assert ema.num_updates == 2
    refused = None
    try:
        ema.load_state_dict({"num_updates": 2, "shadow": None})
    except ValueError as error:
        refused = str(error)
    return passes(engine, ema, alone, rank) | {"refused": refused}


def adapters(rank, name):
    """peft's LoRA: its base as the reference, and what is trained then."""
    from peft import LoraConfig, inject_adapter_in_model

    from agsm_loss.integrations.hosts.base import adapters_off

    torch.manual_seed(0)
    net = Net("full").requires_grad_(False)
    bare = copy.deepcopy(net)
    config = LoraConfig(r=2, target_modules=["query", "out", "base"], init_lora_weights=False)
    inject_adapter_in_model(config, net)
    for n, p in net.named_parameters():
        p.requires_grad_("lora_" in n and "query.lora_A" not in n)  # one is left out by hand
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    alone = copy.deepcopy(net)
    engine = ENGINES[name](net)
    told = {"reference": [], "gradient": [], "moved": []}
    for step in range(2):
        x = host_inputs(rank, step)
        with torch.no_grad(), adapters_off(engine.module):
            told["reference"].append(apart([engine.module(*x)], [bare(*x)]))
        pred = engine.module(*x)
        told["moved"].append(apart([pred], [bare(*x)]))
        engine.backward(pred.square().mean() / 100)
        ranks = range(dist.get_world_size())
        losses = [alone(*host_inputs(one, step)).square().mean() / 100 for one in ranks]
        mean = torch.autograd.grad(sum(losses) / len(losses), alone.trained)
        told["gradient"].append(apart(engine.gradients(), mean))
        with_gradient = [n for n, p in net.named_parameters() if p.grad is not None]
        told["others"] = [n for n in with_gradient if n not in trained]
        engine.step()
        for p, value in zip(alone.trained, engine.values(), strict=True):
            p.data.copy_(value)
    return told


def refusal(make):
    try:
        make()
    except ValueError as error:
        return str(error)
    return "nothing"


def use(denoiser, ema, **settings):
    """An EMA pass, as the regularizer makes it."""
    agsm = regularizer(denoiser, ema, neg_scale=0, **settings)
    agsm(*batch_of(0), CAPTIONS["alike"][0])


def fsdp1(rank):
    """FSDP1, with the EMA made of the module or its parameters, before it or after."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    told = {}
    for flat in (True, False):
        for first in (True, False):
            for of in ("module", "parameters"):
                net = Net("full")

                def ema(module, of=of):
                    return EMA(module if of == "module" else module.parameters())

                def whole(net=net, first=first, flat=flat, ema=ema):
                    before = ema(net) if first else None
                    wrapped = FullyShardedDataParallel(
                        net, use_orig_params=not flat, device_id=torch.device("cpu")
                    )
                    use(wrapped, before or ema(wrapped))

                told[f"{flat=} {first=} {of}"] = refusal(whole)
    return told


def parameters_alone(rank):
    """FSDP2 where the EMA has parameters: what is refused, and what a regularizer makes right."""
    told = {}
    engine, _, alone = made("fsdp2", "full")
    ema = EMA(engine.module.parameters(), decay=0.5)
    told["no module"] = refusal(lambda: ema.applied().__enter__())
    use(engine.module, ema)
    train(engine, ema, alone, rank, 2)
    told["regularizer"] = passes(engine, ema, alone, rank)
    net = Net("full")
    before = EMA(net.parameters())
    module = FSDP2(net).module
    told["before"] = refusal(lambda: use(module, before))
    return told


def no_backward(rank, name):
    engine, ema, _ = made(name, "full")
    return refusal(lambda: use(engine.module, ema, backward=engine.module.backward))


def compiled(rank, name):
    """torch.compile around the engine, the passes in turn."""
    engine, ema, alone = made(name, "full")
    engine.module = torch.compile(engine.module, backend="aot_eager")
    ema = EMA(engine.module, decay=0.5)
    train(engine, ema, alone, rank, 2)
    return passes(engine, ema, alone, rank)
