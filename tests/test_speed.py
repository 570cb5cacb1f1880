"""The speed study's plain loop is honest: it computes what the engines compute."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from metaseg.engine import Reference
from metaseg.engine.flat import gather, ordered_parameters

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
import speed


def test_the_plain_loop_adapts_as_the_reference_does() -> None:
    args = argparse.Namespace(device="cpu", model="efficientlab_lite0", test_steps=2, tasks=1)
    plain = speed.Contender("plain", args, size=32)
    plain.net.double().dropout = torch.nn.Identity()  # the draws differ
    for block in plain.net.backbone.modules():
        if hasattr(block, "drop_path"):
            block.drop_path = torch.nn.Identity()
    adapt = Reference(plain.net, replace(plain.update, dropout=0.0))
    adapt(plain.net, plain.meta_batch[0])
    phi = gather(ordered_parameters(plain._adapt(plain.meta_batch[0].batches)))
    start = gather(ordered_parameters(plain.net))
    assert (phi - adapt.vector()).norm() < 1e-6 * (phi - start).norm()
    assert len(plain.meta_batch) == speed.META_BATCH


def test_ratio_and_table_read_the_measurements() -> None:
    row = {"train_s": [2.0, 1.0, 3.0], "evaluate_s": [4.0], "images_per_s": 100.0, "memory_mb": 10, "start_up_s": 1}
    row["profile"] = {"convolution": 0.5, "other": 0.5}
    results = {"plain": row, "fast": {**row, "evaluate_s": [2.0], "images_per_s": 150.0}, "higher": {"missing": "no"}}
    assert speed._ratio(results, "evaluate_s") == 2.0
    ceilings = {"matmul_gflops": 100, "copy_gbs": 10, "gflop_per_step": 5, "share_of_matmul": 0.5}
    size = {"contenders": results, "loading": {"waiting_share": 0.01}, "memory_ratio": 1.0, "ceilings": ceilings}
    done = {"command": "c", "commit": "d", "machine": "m", "model": "n", "sizes": {"96": size}}
    assert "| 96² | metaseg, engine=auto | 150.0 | 1.50 |" in speed.table(done)
    assert "| 96² | plain PyTorch loop | 50.0 (40.0) | 50.0 (40.0) |" in speed.table(done)
    assert "| 96² | higher, first order | no |" in speed.table(done)
