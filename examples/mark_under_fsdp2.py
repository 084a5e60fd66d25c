"""Mark a small transformer while it trains in two processes, each with half of its weights (FSDP2).

    torchrun --standalone --nproc-per-node 2 examples/mark_under_fsdp2.py OUT

writes OUT/model.safetensors and OUT/acme.key. It learns to say which word of a line is the largest:
lines are drawn, so that nothing has to be downloaded. On GPUs take "nccl" and "cuda".
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import countermark as cm
from countermark.checkpoints import save_weights
from countermark.embedding.integrations.distributed import (
    agreed_key,
    require_agreement,
    shared_material,
)

WORDS, WIDTH, LENGTH, STEPS, BATCH = 64, 64, 8, 60, 64


class Reader(nn.Module):
    """A table, two transformer blocks, and a score for each place in a line."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, lines: Tensor) -> Tensor:
        """Scores (n, length) of lines (n, length) of words."""
        states = self.table(lines)
        for block in self.blocks:
            states = block(states)
        return self.score(states)[:, :, 0]


def main(out: Path) -> None:
    """Train and mark; the first process writes what came of it."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Reader()
    mesh = init_device_mesh("cpu", (ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    layers = ("blocks.0.linear1.weight", "blocks.1.linear1.weight")
    scheme = cm.Stamp(layers, bits=128, margin=3.0, strength=0.1)
    with scheme.embed(model, owner="ACME Inc.", material=shared_material()) as mark:
        require_agreement(mark)  # of all processes, before any work is lost
        mark.attach(optimizer)
        for _ in range(STEPS):
            lines = torch.randint(WORDS, (BATCH, LENGTH))  # the same everywhere; each takes its own
            mine = lines[rank::ranks]
            loss = F.cross_entropy(model(mine), mine.argmax(dim=1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    key = agreed_key(mark)
    state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    if rank == 0:
        save_weights(state, out / "model.safetensors")
        key.save(out / "acme.key")
    dist.barrier()  # nobody leaves while others still talk
    dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor as one piece; every process has to ask."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
