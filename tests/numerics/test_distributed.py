"""Two processes learn the same scores as one, for the same global batch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM

from soco_train.artifacts import Scores, SpectrumStore
from soco_train.layers import select_linears
from soco_train.scorers import ScoringTask, train_scores
from soco_train.settings import LayerSettings, PlanSettings, TrainSettings
from soco_train.spectrum import decompose_layers
from soco_train.statistics import LayerStatistics

CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


def learn(rank: int, processes: int, folder: Path) -> None:
    """Train in one of `processes` processes and write the scores of rank 0."""
    torch.set_num_threads(1)
    if processes > 1:
        store = f"file://{folder / 'rendezvous'}"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    linears = select_linears(model, LayerSettings())
    spectra = SpectrumStore(folder / f"spectrum-{processes}-{rank}")
    decompose_layers(linears, dict.fromkeys(linears, LayerStatistics()), "plain", 0.0, spectra)
    tokens = torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(9))
    train = TrainSettings(steps=12, batch_tokens=64, lr=0.02, basis="plain", start="ones")
    work = folder / f"work-{processes}-{rank}"
    scores = train_scores(ScoringTask(model, linears, spectra, tokens, train, PlanSettings(keep_params=0.6), work))
    if rank == 0:
        scores.save(folder / f"scores-{processes}.safetensors")
    if processes > 1:
        distributed.destroy_process_group()


def test_two_processes_learn_the_scores_of_one(tmp_path: Path) -> None:
    learn(0, 1, tmp_path)
    multiprocessing.spawn(learn, args=(2, tmp_path), nprocs=2)
    one, two = (Scores.load(tmp_path / f"scores-{count}.safetensors") for count in (1, 2))
    for name, layer in one.layers.items():
        torch.testing.assert_close(two.layers[name].scale, layer.scale, rtol=0, atol=1e-5)
        torch.testing.assert_close(two.layers[name].importance, layer.importance, rtol=0, atol=1e-5)
