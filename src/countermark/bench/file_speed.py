"""What marks in finished checkpoints cost: a stamp, and one suspect against many keys."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from countermark.bench.ratios import Ratio, command, paired, ratio
from countermark.checkpoints import save_weights
from countermark.schemes.uchida.scheme import Uchida
from countermark.stamping.making import StampPaths, stamp

_SIDE, _LAYERS, _SHARDS = 4096, 32, 8  # a GiB in bfloat16, eight times
_FEW, _MANY = 1000, 5000  # as many as start processes of their own
_LAYER, _SHAPE = "features.0.weight", (64, 27)  # 1,728 weights, as VGG16's first layer
_PAIRS = 3


def file_ratios() -> list[Ratio]:
    """All ratios of marks in files; about two minutes."""
    return [stamping(), many_keys()]


def stamping(side: int = _SIDE, layers: int = _LAYERS) -> Ratio:
    """Elapsed time of `stamp`, of a checkpoint in eight shards, against copying it to the disk."""
    with tempfile.TemporaryDirectory(dir=".") as name:  # a disk, which /tmp may not be
        source, out, key = (Path(name) / part for part in ("source", "out", "key"))
        size = _checkpoint(source, side, layers)

        def stamped() -> None:
            stamp(source, StampPaths(out, key), owner="bench", keep_before=False)

        def copied() -> None:
            out.mkdir()
            for each in source.iterdir():
                with each.open("rb") as given, (out / each.name).open("wb") as made:
                    shutil.copyfileobj(given, made, 1 << 24)
                    made.flush()
                    os.fsync(made.fileno())

        def timed(work: Callable[[], None]) -> float:
            began = time.perf_counter()
            work()
            taken = time.perf_counter() - began
            shutil.rmtree(out)
            shutil.rmtree(key, ignore_errors=True)
            return taken

        ratios = paired(lambda: timed(stamped), lambda: timed(copied), _PAIRS)
    what = f"stamp a BF16 checkpoint of {size / 1e9:.1f} GB (elapsed time)"
    return ratio(what, "a copy of it with fsync", ratios, 1.5)


def _checkpoint(folder: Path, side: int, layers: int) -> int:
    """A folder of shards, of square layers whose values repeat; its bytes."""
    folder.mkdir()
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


def many_keys(few: int = _FEW, many: int = _MANY) -> Ratio:
    """CPU time of `identify` for each of many keys, against each of few: whether it stays flat."""
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

        def each(keys: str) -> float:
            words = ["-m", "countermark", "identify", str(suspect), "--keys", str(folder / keys)]
            return command(words, exits=1) / each_of[keys]

        ratios = paired(lambda: each("many"), lambda: each("few"), _PAIRS)
    return ratio(
        f"identify, each of {many:,} keys of 512 bits", f"each of {few:,} keys", ratios, 1.3
    )
