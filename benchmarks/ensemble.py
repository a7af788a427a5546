"""Seconds of an epoch of the ensemble's training beside that of the project it comes from, and a whole training.

python benchmarks/ensemble.py epoch [--rounds 4]                10,000 rows, the 10k configuration, same model size
python benchmarks/ensemble.py train --embeddings DIR            our network to convergence on real arrays, with its time

The seed's loop: each row's tensors are made anew and collated by a DataLoader, float32, Adam, no shuffling. Figures go
to benchmarks/ensemble.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from turns import Prepared, in_turns, lines, ratio, record

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))  # for the seed's network
ROWS, WIDTHS = 10_000, (512, 768, 384)


def data() -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(ROWS, width)).astype(np.float32) for width in WIDTHS]
    targets = rng.normal(size=(ROWS, 384)).astype(np.float32)
    return arrays, targets / np.linalg.norm(targets, axis=1, keepdims=True)


def seeds_loop() -> Prepared:
    import torch
    from earlier_ensemble import PRESETS, SeedFusion
    from torch import nn

    preset = PRESETS["10k"]
    arrays, targets = data()

    class Data(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, row: int) -> list[torch.Tensor]:
            return [torch.tensor(array[row]) for array in (*arrays, targets)]

    network = SeedFusion(WIDTHS)
    loader = torch.utils.data.DataLoader(Data(), preset.batch_size)
    optimizer = torch.optim.Adam(network.parameters(), preset.learning_rate)
    loss_of, same = nn.CosineEmbeddingLoss(), torch.tensor([1])

    def run() -> None:
        network.train()
        for *inputs, truth in loader:
            optimizer.zero_grad()
            loss_of(network(inputs), truth, same).backward()
            optimizer.step()

    return run


def ours() -> Prepared:
    import torch

    from image_to_prompts.ensemble import Config, loop
    from image_to_prompts.models import networks
    from image_to_prompts.run.devices import process_state
    from image_to_prompts.training.loop import batches

    process_state()  # which keeps freed memory, as `loop.fit` does
    config = Config()  # the earlier ensemble's 10k preset
    arrays, targets = data()
    trainer = loop.Trainer(networks.Fusion(WIDTHS), config.learning_rate)
    tensors, truth = [torch.from_numpy(array) for array in arrays], torch.from_numpy(targets)

    def run() -> None:
        order = batches(np.arange(ROWS), 0, 1, config.batch_size)
        trainer.epoch(tensors, truth, order, [config.learning_rate] * len(order))

    return run


def epoch(options: argparse.Namespace) -> dict[str, object]:
    from earlier_ensemble import SeedFusion

    from image_to_prompts.models import networks

    sizes = {
        name: sum(parameter.numel() for parameter in network(WIDTHS).parameters()) / 1e6
        for name, network in {"the seed's loop": SeedFusion, "ours": networks.Fusion}.items()
    }
    print("parameters, millions:", {name: round(size, 1) for name, size in sizes.items()})
    seconds, memory = in_turns({"the seed's loop": (seeds_loop, (), {}), "ours": (ours, (), {})}, options.rounds)
    print(f"an epoch of {ROWS} rows: seconds")
    print(lines(seconds, memory, "the seed's loop"))
    return {"seconds": seconds, "peak GB": memory, "parameters": sizes} | {
        "times as fast": ratio(seconds, "the seed's loop", "ours")
    }


def train(options: argparse.Namespace) -> dict[str, object]:
    from image_to_prompts import ensemble

    with tempfile.TemporaryDirectory() as folder:
        config = ensemble.Config(embeddings=options.embeddings, out=Path(folder) / "ensemble")
        start = time.perf_counter()
        members = ensemble.run(config)
        seconds = time.perf_counter() - start
        cosines = pd.read_csv(config.out / "history.csv")["cosine"].tolist()
    print(members.round(4).to_string(index=False))
    print(f"validation before and after each epoch: {', '.join(f'{cosine:.4f}' for cosine in cosines)}")
    print(f"{len(cosines) - 1} epochs, {seconds:.0f} s, validation {members['validation'].iloc[1]:.4f}")
    return {"seconds": seconds, "cosines": cosines, "members": members.to_dict("records")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("epoch", "train"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--embeddings", type=Path, default=Path("runs/default/embeddings"))
    options = parser.parse_args()
    found = {"epoch": epoch, "train": train}[options.what](options)
    record(__file__, options.what, found)


if __name__ == "__main__":
    main()
