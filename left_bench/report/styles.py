"""One colour and one marker for a method, in every plot of every report and on the page."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

from left_bench.report.cells import Row, option

# Okabe and Ito's colours, which stay apart for colour-blind readers; their yellow is too pale for a white card.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p")
"""As matplotlib calls them; `page/scatter.js` draws the same shapes in the same order."""
FILLS = ("full", "none", "left", "bottom", "right", "top", "pale")
"""How a marker is filled, by the quantization, as matplotlib calls it; `pale` is its colour thinned."""
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
# The place in this list decides, so a new method goes to its end. 7 colours and 11 markers are 77 pairs.
METHODS = (
    *("lora", "full", "dora", "ia3", "prefix_tuning", "prompt_tuning", "ln_tuning", "adalora", "vera", "p_tuning"),
    *("llama_adapter", "pfeiffer", "houlsby", "bitfit", "oft", "boft", "loha", "lokr", "rslora", "pissa", "olora"),
    *("loftq", "eva", "corda", "loraplus", "lora_ga", "lora_attention", "lora_orthogonal", "fourierft", "waveft"),
    *("hra", "road", "randlora", "vblora", "miss", "shira", "c3a", "osf", "delora", "gralora", "hira", "layer_freeze"),
    *("adamss", "alora", "bdlora", "beft", "cartridge", "cpt", "custom", "deft", "frod", "glora", "kasa", "lily"),
    *("mica", "monteclora", "multitask_prompt_tuning", "peanut", "poly", "psoft", "pvera", "shadow", "supertuning"),
    *("tinylora", "trainable_tokens", "unilora", "velora", "qlora"),
)
_PAIRS = len(COLOURS) * len(MARKERS)


class Style(NamedTuple):
    """Numbers into COLOURS, MARKERS and DASHES."""

    colour: int
    marker: int
    dash: int = 0


def method_style(method: str) -> Style:
    """A method's own; of one that left_bench does not ship its name decides, and two may then share a style."""
    place = METHODS.index(method) if method in METHODS else zlib.crc32(method.encode(errors="replace")) % _PAIRS
    return Style(place % len(COLOURS), place % len(MARKERS))


def row_styles(rows: Sequence[Row]) -> list[Style]:
    """A style for each row: its method's, dashed otherwise where another row has the method; where there is one method
    alone, styles by place, for then they have something else to tell apart.
    """
    methods = [str(option(row, "peft")) for row in rows]
    if len(set(methods)) < 2:
        return [Style(i % len(COLOURS), i % len(MARKERS), i // len(COLOURS) % len(DASHES)) for i in range(len(rows))]
    seen: dict[str, int] = {}
    styles = []
    for method in methods:
        again = seen[method] = seen.get(method, -1) + 1
        styles.append(method_style(method)._replace(dash=again % len(DASHES)))
    return styles


def quantizations(rows: Sequence[Row]) -> list[str]:
    """Those of the rows, unquantized first; a marker's fill tells which."""
    return sorted({str(option(row, "quantization")) for row in rows}, key=lambda name: (name != "none", name))
