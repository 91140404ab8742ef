"""Train the demo's transformer on a text of your own.

Run: python examples/train_transformer.py some_text.txt [steps]

The model, with its backward pass written out around cuflash's attention, is in cuflash/demo/transformer.py; the loop in cuflash/demo/training.py.
"""

import sys
from pathlib import Path

import numpy

from cuflash.demo.training import Text, held_out_loss, train
from cuflash.demo.transformer import Shape, Transformer

path = Path(sys.argv[1] if len(sys.argv) > 1 else __file__)
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 100

text = Text(numpy.frombuffer(path.read_bytes(), numpy.uint8), num_files=1)
model = Transformer(Shape(), numpy)  # or cupy, on a GPU
for step, loss in enumerate(train(model, text, steps, seed=0), start=1):
    if step % 10 == 0:
        print(f"step {step}: {loss:.3f} nats per byte", flush=True)
print(f"held out: {held_out_loss(model, text):.3f}; the frequencies of bytes alone give {text.unigram_entropy:.3f}")
