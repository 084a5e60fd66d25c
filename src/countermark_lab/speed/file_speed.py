"""Cost of marks in finished checkpoints: making a stamp, and one suspect against many keys."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from countermark.checkpoints import save_weights
from countermark.schemes.uchida.scheme import Uchida
from countermark.stamping.making import StampPaths, stamp
from countermark_lab.speed.ratios import Ratio, measure_in_turn, summarise_ratios, time_command

_SIDE, _LAYERS, _SHARDS = 4096, 32, 8  # a GiB in bfloat16, eight times
# Numbers of keys: both above the number from which `identify` starts processes of its own.
_FEW, _MANY = 1000, 5000
_LAYER, _SHAPE = "features.0.weight", (64, 27)  # 1,728 weights, as VGG16's first layer
_PAIRS = 3


def measure_file_ratios() -> list[Ratio]:
    """Measure all ratios of marks in files, in about two minutes."""
    return [measure_stamping(), measure_many_keys()]


def measure_stamping(side: int = _SIDE, layers: int = _LAYERS) -> Ratio:
    """Compare the elapsed time of stamping a checkpoint in eight shards with a plain copy.

    Args:
        side: rows and columns of each layer.
        layers: layers of each shard.
    """
    # In the working directory, which is on a disk; /tmp may be memory.
    with tempfile.TemporaryDirectory(dir=".") as name:
        source, out, key = (Path(name) / part for part in ("source", "out", "key"))
        size = _write_checkpoint(source, side, layers)

        def stamp_checkpoint() -> None:
            """Stamp the checkpoint."""
            stamp(source, StampPaths(out, key), owner="bench", keep_before=False)

        def copy_checkpoint() -> None:
            """Copy the checkpoint and wait until the disk has it, as `stamp` does."""
            out.mkdir()
            for each in source.iterdir():
                with each.open("rb") as given, (out / each.name).open("wb") as made:
                    shutil.copyfileobj(given, made, 1 << 24)
                    made.flush()
                    os.fsync(made.fileno())

        def measure_elapsed(work: Callable[[], None]) -> float:
            """Return the elapsed seconds of some work, and remove its output."""
            began = time.perf_counter()
            work()
            taken = time.perf_counter() - began
            # Outside the measured time; the next turn needs free output paths.
            shutil.rmtree(out)
            shutil.rmtree(key, ignore_errors=True)
            return taken

        ratios = measure_in_turn(
            lambda: measure_elapsed(stamp_checkpoint),
            lambda: measure_elapsed(copy_checkpoint),
            _PAIRS,
        )
    what = f"stamp a BF16 checkpoint of {size / 1e9:.1f} GB (elapsed time)"
    return summarise_ratios(what, "a copy of it with fsync", ratios, 1.5)


def _write_checkpoint(folder: Path, side: int, layers: int) -> int:
    """Write a folder of shards of square layers; return its size in bytes."""
    folder.mkdir()
    # All layers share one tensor, so the checkpoint takes no time to make and little memory.
    tile = (0.02 * torch.randn(side, side)).bfloat16()
    where: dict[str, str] = {}
    for shard in range(_SHARDS):
        file = f"model-{shard + 1:05}-of-{_SHARDS:05}.safetensors"
        names = [f"layers.{shard * layers + n}.weight" for n in range(layers)]
        save_weights(dict.fromkeys(names, tile), folder / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(each.stat().st_size for each in folder.iterdir())


def measure_many_keys(few: int = _FEW, many: int = _MANY) -> Ratio:
    """Compare the CPU time of `identify` for each key, with many keys and with few keys."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suspect, scheme = folder / "suspect.safetensors", Uchida(_LAYER, 512)
        save_weights({_LAYER: torch.randn(_SHAPE)}, suspect)
        for number in range(many):
            key = scheme.generate_key({_LAYER: _SHAPE}, owner="bench")
            key.save(folder / "many" / str(number))
            if number < few:
                key.save(folder / "few" / str(number))
        each_of = {"few": few, "many": many}

        def measure_each_key(keys: str) -> float:
            """Return the CPU seconds for each key of a folder."""
            words = ["-m", "countermark", "identify", str(suspect), "--keys", str(folder / keys)]
            # Exit code 1: no key matches the random suspect.
            return time_command(words, exits=1) / each_of[keys]

        ratios = measure_in_turn(
            lambda: measure_each_key("many"), lambda: measure_each_key("few"), _PAIRS
        )
    return summarise_ratios(
        f"identify, each of {many:,} keys of 512 bits", f"each of {few:,} keys", ratios, 1.3
    )
