"""Which margin does a checkpoint need? A sweep on Ray, two stamps at a time.

    python examples/sweep_on_ray.py CHECKPOINT.safetensors

stamps the checkpoint once for each margin, does to every copy what a thief might, and prints how
much the weights changed and how many bits are still right. Nothing is kept. On a cluster give
ray.init its address; each task takes one core.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray

MARGINS = (2.0, 3.0, 4.0)
BITS = 128


@ray.remote(num_cpus=1)
def tried(source: str, margin: float) -> dict[str, Any]:
    """One margin: how much the weights change, and the bits that are right after each attack."""
    from countermark.attacks.base import NamedTensors
    from countermark.attacks.noise import Noise
    from countermark.attacks.prune import Prune
    from countermark.attacks.quantise import Quantise
    from countermark.checkpoints import load_state
    from countermark.stamping import stamp
    from countermark.stamping.making import StampPaths
    from countermark.verification.verify import verify

    attacks = {"noise": Noise(1.0), "pruned": Prune(0.9), "int4": Quantise(4, "channel")}
    with tempfile.TemporaryDirectory() as folder:
        places = StampPaths(Path(folder) / "m.safetensors", Path(folder) / "a.key")
        fields = {"bits": BITS, "margin": margin}
        done = stamp(Path(source), places, owner="ACME Inc.", fields=fields)
        host = NamedTensors(load_state(places.out))
        right = {
            name: verify(attack.run(host).model, done.key).matched
            for name, attack in attacks.items()
        }
    return {"margin": margin, "change": done.change, "right": right, "process": os.getpid()}


def main(source: str) -> None:
    """Print a line of JSON for each margin."""
    ray.init(
        num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}
    )
    for row in ray.get([tried.remote(source, margin) for margin in MARGINS]):
        sys.stdout.write(json.dumps(row) + "\n")
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
