"""The HTML report without a browser: what is in the file, and that nothing in it can act."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded.build import LAPTOP, make_record, peft

from left_bench.report.baseline import find_baseline
from left_bench.report.cells import Row, row_of, sweep_rows
from left_bench.report.load import Problem, read_runs, read_sweeps
from left_bench.report.page import _SCRIPTS, _asset, as_json, write_page
from left_bench.report.page.data import CURVE_POINTS, status_of, thin_out
from left_bench.report.page.markup import ROWS_SHOWN
from left_bench.report.ranking import standing
from left_bench.report.values import format_value
from left_bench.spec.record import STATUSES, Record, Sample

RECORDED = Path(__file__).parent / "recorded"
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "\"'><svg onload=alert(1)>",
    "a | b \\ `c` ${title} $title {{data}}",
    "javascript:alert(1)//\n\r\u2028\u2029]]>",
    "\u202egpj.exe\u202c \x00\x1b[31m \ud800",
    "&lt;b&gt; &#60;script&#62;",
    "https://example.org/x.png",
]
NEVER = {"img", "iframe", "object", "embed", "link", "base", "form", "image", "video", "audio"}


class Elements(HTMLParser):
    """The page's elements as a browser would find them, and the text of each."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.style = ""
        self._open = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self._open == "style":
            self.style += data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict[str, Any]:
        [block] = [text for attributes, text in self.scripts if attributes.get("type") == "application/json"]
        return json.loads(block)


def page_of(rows: list[Row], tmp_path: Path, **more: Any) -> str:
    path = write_page(rows, **({"title": "a sweep", "path": tmp_path / "page.html"} | more))
    return path.read_text(encoding="utf-8")


def recorded_rows(name: str) -> list[Row]:
    runs, problems = read_runs(RECORDED / name)
    sweeps, _ = read_sweeps(RECORDED / name)
    return sweep_rows(sweeps[0], runs, problems) if sweeps else [row_of(run) for run in runs]


def hostile_record(texts: list[str]) -> Record:
    a, b, c, d, e, f, g, h = texts
    record = make_record(
        changes={"model.name_or_path": a, "training.schedule": b},
        choices={"model": a, "peft": b, "quantization": c},
        provenance={"command": d, "notes": [e], "log_tail": f},
    )
    return record.model_copy(
        update={
            "cell_id": f"{g}",
            "memory_breakdown": {h: 1},
            "samples": [Sample(prompt=a, reference=b, prediction=c, base_prediction=d)],
            "environment": {"machine": LAPTOP | {"cpu": b, "id": c}, "versions": {d: e}, "effective": {f: g}},
            "metrics": record.metrics | {h: 1.0},
        }
    )


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = recorded_rows("methods")
    return page_of(rows, tmp_path_factory.mktemp("page"), title="peft_methods", baseline=find_baseline(rows))


# ---- what is there


def test_every_cell_status_and_reason_is_there_without_a_script(methods: str) -> None:
    elements, rows = Elements(methods), recorded_rows("methods")
    assert {row.status for row in rows} == {*STATUSES, "not run"}
    for row in rows:
        assert status_of(row) in elements.text
        assert row.reason is None or row.reason in elements.text
    table = methods.split('<table id="leaderboard">', 1)[1].split("</table>", 1)[0]
    assert table.count("<tr>") == len(rows) + 1
    for row in rows:
        for name in ("exact_match", "peak_memory_bytes", "train_tokens_per_second"):
            assert row.value(name) is None or format_value(name, row.value(name)) in table


def test_the_data_hold_the_numbers_and_their_text(methods: str) -> None:
    data, rows = Elements(methods).data, recorded_rows("methods")
    strings = data["strings"]
    assert data["cells"] == len(rows) and len(set(strings)) == len(strings)
    assert [strings[i] for i in data["ids"]] == [row.cell_id for row in rows]
    assert [strings[i] for i in data["status"]] == [status_of(row) for row in rows] and "OOM" in strings
    for metric in data["metrics"]:
        for i, row in enumerate(rows):
            value = row.value(metric["name"])
            assert (metric["numbers"][i] is None) == (metric["texts"][i] is None) == (value is None)
            if value is not None:
                assert metric["numbers"][i] == pytest.approx(value, rel=1e-6)
                assert strings[metric["texts"][i]].startswith(format_value(metric["name"], value))
    [memory] = [metric for metric in data["metrics"] if metric["name"] == "peak_memory_bytes"]
    assert strings[memory["texts"][0]] == "1.36 GiB" and (memory["scale"], memory["unit"]) == (2**30, "GiB")
    lora = next(i for i, row in enumerate(rows) if row.ok and row.record and row.record.choices["peft"] == "lora")
    [exact] = [metric for metric in data["metrics"] if metric["name"] == "exact_match"]
    result = standing(rows, "exact_match")
    assert result is not None and [rows[i].cell_id for i in exact["best"]] == [result.best.cell_id]
    assert {rows[i].cell_id for i in exact["unresolved"]} == {row.cell_id for row, _ in result.unresolved} != set()
    assert methods.count('<span class="tie">') == sum(
        len(m.get("unresolved", ())) for m in data["metrics"] if m["name"] in data["shown"]
    )
    assert strings[memory["against"][lora]] == "0.61×" and memory["best"] == [lora + 1]
    assert strings[data["commands"][lora]] == "left-bench peft=lora"
    assert [curve[0] for curve in data["curves"]] == [i for i, row in enumerate(rows) if row.ok]


def test_speeds_of_two_machines_are_kept_apart(tmp_path: Path) -> None:
    page = page_of(recorded_rows("two_machines"), tmp_path)
    [speed] = [m for m in Elements(page).data["metrics"] if m["name"] == "train_tokens_per_second"]
    assert speed["groups"] == [0, 0, 1, 1] and speed["best"] == []
    assert "speed is sorted within each machine, and no cell is the fastest" in page
    assert "batch_size" in Elements(page).text  # a confounder


def test_random_weights_have_no_quality(tmp_path: Path) -> None:
    page = page_of(recorded_rows("random_weights"), tmp_path)
    assert "Random weights: no quality is scored." in page
    assert not [m for m in Elements(page).data["metrics"] if m["kind"] == "quality"]


def test_a_row_of_several_seeds_tells_of_each(tmp_path: Path) -> None:
    changes = peft("lora", r=16)
    runs = [
        make_record(
            changes=changes | {"seed": seed}, exact_match=0.5 + seed / 10, peak_mib=800 + 10 * seed, minute=seed
        )
        for seed in range(2)
    ]
    runs.append(make_record(changes=changes | {"seed": 2}, status="oom", reason="not enough memory", minute=3))
    pooled, other = row_of(runs[0]), row_of(make_record(exact_match=0.4))
    object.__setattr__(pooled, "members", tuple(map(row_of, runs)))
    page = Elements(page_of([pooled, other], tmp_path, labels=["lora", "full"]))
    data = page.data
    told = data["details"][0]
    strings = data["strings"]
    assert strings[data["status"][0]] == "2 of 3 ok" and strings[data["reasons"][0]] == "not enough memory"
    assert [strings[run[0]] for run in told["runs"]] == ["0", "1", "2"] and strings[told["seed"]] == "0"
    assert [strings[run[1]] for run in told["runs"]] == ["ok", "ok", "OOM"]
    assert data["memory"][0][-1][0] == pytest.approx(805 * 2**20, rel=1e-6)
    assert "4 cells (3 ok, 1 OOM)" in page.text and "lora seed 2 OOM not enough memory" in page.text
    assert "runs" not in data["details"][1]


def test_files_that_could_not_be_read_and_notes_are_told(tmp_path: Path) -> None:
    problem = Problem(Path("/home/someone/runs/a-cell/record.json"), "schema version 0 <b>")
    text = Elements(
        page_of(recorded_rows("ranks"), tmp_path, problems=[problem], notes=["Take <i>this</i> cell."])
    ).text
    assert "1 file could not be read" in text and "runs/a-cell/record.json : schema version 0 <b>" in text
    assert "Take <i>this</i> cell." in text and "/home/someone" not in text


@pytest.mark.parametrize("rows", [[], [Row(cell_id="a-cell", status="not run")], [row_of(make_record())]])
def test_pages_of_nothing_and_of_one_cell(rows: list[Row], tmp_path: Path) -> None:
    data = Elements(page_of(rows, tmp_path)).data
    assert data["cells"] == len(rows) and data["baseline"] is None


def test_the_same_records_make_the_same_bytes(methods: str, tmp_path: Path) -> None:
    rows = recorded_rows("methods")
    assert page_of(rows, tmp_path, title="peft_methods", baseline=find_baseline(rows)) == methods


def test_many_cells_stay_a_file_that_opens(tmp_path: Path) -> None:
    rows = [
        row_of(make_record(changes=peft(f"method_{n % 40}") | {"seed": n // 40}, exact_match=n / 1300, minute=n % 60))
        for n in range(1200)
    ]
    page = page_of(rows, tmp_path)
    assert len(page) < 1_200 * 1_500
    assert page.count("<tr><th") < ROWS_SHOWN + 150  # the table's first rows, and the glossary
    assert "first 1,000 cells only" in page
    details = Elements(page).data["details"]
    assert "samples" in details[999] and "samples" not in details[1000]


def test_long_curves_are_thinned_out() -> None:
    assert thin_out([1, 2, 3], [3.0, 2.0, 1.0]) == ([1, 2, 3], [3.0, 2.0, 1.0])
    steps, losses = thin_out(range(1, 1002), [1.0] * 1000 + [12.0])
    assert len(steps) == len(losses) <= CURVE_POINTS and steps[-1] == 1001 and steps[0] == 11
    assert losses[0] == 1.0 and losses[-1] == 2.0  # the mean of the last eleven


# ---- what cannot be there


@pytest.mark.parametrize("turn", range(len(HOSTILE)))
def test_a_record_writes_nothing_into_the_page_but_text(turn: int, tmp_path: Path) -> None:
    texts = HOSTILE[turn:] + HOSTILE[:turn]
    plain = Elements(page_of([row_of(hostile_record(["word"] * 7 + ["other"]))], tmp_path))
    elements = Elements(page_of([row_of(hostile_record(texts))], tmp_path, title=texts[0], notes=[texts[1]]))
    allowed = {tag for tag, _ in plain.found} | {"p"}
    assert {tag for tag, _ in elements.found} <= allowed and not allowed & NEVER
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert not [attributes for tag, attributes in elements.found if "src" in attributes or "style" in attributes]
    assert [attributes["href"] for _, attributes in elements.found if "href" in attributes] == ["#cells"]
    assert len(elements.scripts) == 2
    assert elements.scripts[1] == plain.scripts[1] and elements.style == plain.style
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b\ud800]", json.dumps(elements.data, ensure_ascii=False))


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
@settings(max_examples=100)
def test_json_in_a_script_element_is_the_same_json(value: Any) -> None:
    text = as_json(value)
    assert json.loads(text) == value
    assert not set(text) & set("<>&\u2028\u2029")


def test_nothing_is_fetched_and_only_its_own_script_runs(methods: str) -> None:
    elements = Elements(methods)
    own = methods.replace("http://www.w3.org/2000/svg", "")  # a namespace's name
    assert not re.search(r"https?:|//[\w-]+\.\w|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", own)
    [policy] = [a["content"] for tag, a in elements.found if tag == "meta" and "http-equiv" in a]
    assert policy is not None and policy.startswith("default-src 'none';") and "unsafe" not in policy
    for text, directive in ((elements.style, "style-src"), (elements.scripts[1][1], "script-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy


def test_the_script_never_reads_a_string_as_markup() -> None:
    for name in _SCRIPTS:
        script = _asset(name)
        match = re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|srcdoc", script)
        assert match is None and "</script" not in script, name


# ---- colours


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    """WCAG 2.2's contrast ratio."""
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_in_both_schemes(scheme: int) -> None:
    result = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", _asset("page.css"))
    colours = {name: pair[scheme] for name, *pair in result}
    for paper in ("paper", "raised", "hover", "noted"):
        assert contrast(colours["ink"], colours[paper]) >= 7
    for paper in ("paper", "raised", "hover"):
        for ink in ("muted", "link", "bad", "good"):
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
    for mark in ("edge", "rest", *(f"c{n}" for n in range(7))):
        assert contrast(colours[mark], colours["paper"]) >= 3, mark
