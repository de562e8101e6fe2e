"""Several gloo processes on the CPU, for the tests."""

import os
import socket
import tempfile
from datetime import timedelta

import fresh
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(worker, world_size=2, *arguments):
    """`worker(rank, *arguments)` in each of `world_size` gloo processes; the results by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        fresh.run(_start, world_size, (worker, world_size, port, folder, arguments))
        return {rank: torch.load(f"{folder}/{rank}.pt") for rank in range(world_size)}


def _start(world_size, given):
    mp.start_processes(_rank, args=given, nprocs=world_size, start_method="fork")


def _rank(rank, worker, world_size, port, folder, arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=patience)
    torch.save(worker(rank, *arguments), f"{folder}/{rank}.pt")
    if dist.is_initialized():  # a recipe ends it itself
        dist.barrier()
        dist.destroy_process_group()
