"""Tables, figures and a page from what bench_attention.py wrote, as a script or by pytest.

    python benchmarks/report.py benchmarks/results/nvidia-h200                    tables in Markdown, to stdout
    python benchmarks/report.py benchmarks/results/nvidia-h200 --output OUT       and figures: OUT/speed-*.svg, …, and all of it in OUT/report.html
    python benchmarks/report.py benchmarks/results/nvidia-h200 --predict          predicted.csv beside the results: what the timing model expects of the plain cases
    python benchmarks/report.py --publish                                         README.md and docs/measured.md with their pictures, from all of benchmarks/results

The folder may hold attention.csv, attention.json (pytest's), tiles.csv, predicted.csv, host.json and facts.json; what is missing is left out. Figures need
matplotlib; without it there are tables only. `--predict` takes minutes, NVRTC and nvdisasm, and no GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # cuflash of this clone, whether it is installed or not

from reporting.page import html
from reporting.pictures import pictures, pyplot
from reporting.publishing import publish
from reporting.results import Results
from reporting.tables import tables


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true", help="write README.md and docs/measured.md from all results")
    parser.add_argument("--predict", action="store_true", help="write predicted.csv into the folder")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], help="with --predict")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128, 256], help="with --predict")
    parser.add_argument("folder", type=Path, nargs="?", help="where attention.csv, tiles.csv, host.json, facts.json are")
    parser.add_argument("--output", type=Path, help="folder for figures and page; none without it")
    arguments = parser.parse_args()
    if arguments.publish:
        publish()
        return 0
    if arguments.folder is None:
        parser.error("name a folder of results, or pass --publish")
    results = Results.of(arguments.folder)
    if arguments.predict:
        from reporting.predictions import predict

        print(f"{predict(results, arguments.dtype, arguments.head_dim)} passes predicted")
        return 0
    print("\n\n".join(tables(results)))
    if not results.rows and not results.tiles:
        print(f"no measurements in {arguments.folder}", file=sys.stderr)
        return 1
    if arguments.output:
        plt = pyplot()
        if plt is None:
            print("matplotlib is not installed: no figures", file=sys.stderr)
            return 0
        count = write(results, arguments.output, plt)
        print(f"SUMMARY: {count} figures and report.html in {arguments.output}", file=sys.stderr)
    return 0


def write(results: Results, folder: Path, plt: object) -> int:
    """Figures and page; how many figures."""
    folder.mkdir(parents=True, exist_ok=True)
    made = list(pictures(results, plt))
    for picture in made:
        (folder / f"{picture.name}.svg").write_bytes(picture.svg)
    (folder / "report.html").write_text(html(results, made), encoding="utf-8")
    return len(made)


if __name__ == "__main__":
    sys.exit(main())
