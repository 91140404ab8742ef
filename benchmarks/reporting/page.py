"""One HTML page of a folder of results, with everything in it: no script, no font and no picture from elsewhere.

Contract: predictions are named as such wherever they stand. A page of the simulator's times begins by saying that nothing was measured. Cases in which another
library is faster stand first, in red.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape

from reporting.pictures import Picture
from reporting.results import Results, Row, lead, library
from reporting.tables import facts_line

STYLE = """
:root { color-scheme: light; --loss: #c0392b; --gain: #2471a3; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1c1c1c; background: #fff; margin: 0 auto; max-width: 1180px; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #ddd; } h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
nav a { margin-right: 1rem; } figure { margin: 0 0 1.6rem; } figure img { max-width: 100%; height: auto; display: block; }
figcaption, .small { color: #555; font-size: .85rem; max-width: 60rem; } .unmeasured { background: #fdecea; border-left: 5px solid var(--loss); padding: .6rem 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; } th, td { padding: .15rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 1px solid #999; position: sticky; top: 0; background: #fff; }
.loss { color: #fff; background: var(--loss); } .gain { color: var(--gain); } td.word { text-align: left; }
"""


SECTIONS = {
    "losses": "Where we lose", "speed": "TFLOP/s against length", "memory": "Memory against length", "model": "Predicted against measured", "tiles": "Tile landscape",
}  # fmt: skip
"""Of the page, in their order; each stands there if there is something to show."""


def html(results: Results, pictures: Iterable[Picture]) -> str:
    """The page."""
    shown: dict[str, list[str]] = {"losses": [_losses(results)]}
    for picture in pictures:
        shown.setdefault(picture.section, []).append(_figure(picture))
    present = {name: title for name, title in SECTIONS.items() if name in shown}
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title in present.items())
    sections = "\n".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(shown[name])}</section>' for name, title in present.items()
    )
    title = f"cuflash on {results.gpu}" if results.measured else "cuflash: rehearsal on the simulator, nothing was measured"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{_head(results)}\n<nav>{links}</nav>\n{sections}\n</body></html>\n"
    )


def _head(results: Results) -> str:
    facts = escape(facts_line(results))
    if results.measured:
        return f'<p class="small">Measured. {facts}</p>'
    return (
        '<p class="unmeasured"><strong>Nothing on this page was measured on a GPU.</strong> Tiny shapes ran on the simulator, to rehearse the scripts; the times say '
        f"something of the simulator, nothing of a GPU.</p><p class='small'>{facts}</p>"
    )


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.svg).decode()
    return (
        f'<h3>{escape(picture.title)}</h3><figure><img id="{picture.name}" alt="{escape(picture.title)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


# --- Where we lose ------------------------------------------------------------------------------------------------------------------------


def _losses(results: Results) -> str:
    """Every case against its fastest peer: lost ones first, in red, the worst on top."""
    entries: list[tuple[float, str, str]] = []
    for case, group in _groups(results).items():
        found = lead(group)
        if found is not None:
            entries.append((found[0], found[1], _line(case, group, *found)))
    lost = sorted(entry for entry in entries if entry[0] < 1)
    kept = sorted((entry for entry in entries if entry[0] >= 1), reverse=True)
    what = "" if results.measured else " (on the simulator, which says nothing of a GPU)"
    text = f"cuflash is slower than the fastest other library in {len(lost)} of {len(entries)} cases{what}."
    if not entries:
        text = "No other library was timed on the same cases."
    header = "".join(f"<th>{name}</th>" for name in ("case", "pass", "cuflash TFLOP/s", "fastest other", "its TFLOP/s", "cuflash over it"))
    worst = [line for *_, line in [*lost, *kept]]

    def table(lines: list[str]) -> str:
        return f'<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>' if lines else ""

    rest = f"<details><summary>The other {len(worst) - SHOWN} cases</summary>{table(worst[SHOWN:])}</details>" if len(worst) > SHOWN else ""
    return f"<p>{text}</p>{table(worst[:SHOWN])}{rest}"


SHOWN = 12
"""Cases that are not folded away."""


def _groups(results: Results) -> dict[tuple[str, str], dict[str, Row]]:
    """(case, pass) -> library -> its last timed row, of plain cases and of those with features."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results.rows:
        if row["milliseconds"]:
            dims = row["head_dim"] if row["head_dim_v"] in ("", row["head_dim"]) else f"{row['head_dim']}/{row['head_dim_v']}"
            words = [
                row["case"],
                row["dtype"],
                f"d{dims}",
                f"s{row['seqlen']}",
                f"b{row['batch']}",
                "causal" if row["causal"] == "1" else "",
            ]
            found.setdefault((" ".join(filter(None, words)), row["pass"]), {})[library(row)] = row
    return found


def _line(case: tuple[str, str], group: dict[str, Row], ratio: float, best: str) -> str:
    kind = "loss" if ratio < 1 else "gain"
    rates = (float(group[name]["tflops"]) for name in ("cuflash", best))
    ours, theirs = (f"{rate:.3g}" for rate in rates)
    return (
        f'<tr><td>{escape(case[0])}</td><td class="word">{case[1]}</td><td>{ours}</td><td class="word">{escape(best)}</td><td>{theirs}</td>'
        f'<td class="{kind}">{ratio:.2f}</td></tr>'
    )
