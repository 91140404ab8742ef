"""The tables of docs/hopper.md from second.jsonl: the best kernel of each cell beside cuDNN, TFLOP/s, medians of four rounds."""

import json
from pathlib import Path

cells = [json.loads(line) for line in (Path(__file__).parent / "second.jsonl").read_text().splitlines()]
print("| pass | head_dim | causal | seqlen | cuDNN | cuDNN with LSE | best kernel | which | over cuDNN |\n|---|---|---|---|---|---|---|---|---|")
for cell in (cell for cell in cells if cell["what"] == "cell"):
    rates = {name: sorted(values)[len(values) // 2] for name, values in cell["tflops"].items()}
    name, best = max(((name, rate) for name, rate in rates.items() if not name.startswith("cudnn")), key=lambda each: each[1])
    peer = max(rates["cudnn"], rates.get("cudnn_lse", 0))
    kind = {"F": "forward", "B": "backward"}[cell["which"]]
    lse = f"{rates['cudnn_lse']:.0f}" if "cudnn_lse" in rates else "–"
    words = [kind, cell["D"], "yes" if cell["causal"] else "no", cell["S"], f"{rates['cudnn']:.0f}", lse, f"{best:.0f}", f"`{name}`", f"{best / peer:.2f}"]
    print("| " + " | ".join(map(str, words)) + " |")
