"""The HTML report in a real, headless Chromium: load, sort, filter, hover, focus, themes, a phone, hostile records.

Skipped where there is none: `LEFT_BENCH_CHROMIUM` and `LEFT_BENCH_CHROMEDRIVER`, or both on PATH (Debian's packages
are `chromium` and `chromium-driver`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from recorded.build import make_record, peft
from test_page import HOSTILE, hostile_record, recorded_rows

from left_bench.report.axes import find_axes, labels
from left_bench.report.baseline import find_baseline
from left_bench.report.cells import Row, row_of
from left_bench.report.page import write_page
from left_bench.report.page.data import status_of
from left_bench.report.ranking import pareto_front, standing
from left_bench.report.recommend import pareto_set, recommend
from left_bench.report.seeds import pool
from left_bench.report.styles import row_styles
from left_bench.report.values import one_line
from left_bench.spec.record import CurvePoint

pytest.importorskip("selenium", reason="selenium is not installed (pip install -e '.[test]')")

from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait


def executable(variable: str, *names: str) -> str | None:
    return os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)


CHROMIUM = executable("LEFT_BENCH_CHROMIUM", "chromium", "chromium-browser", "google-chrome")
CHROMEDRIVER = executable("LEFT_BENCH_CHROMEDRIVER", "chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="no Chromium and chromedriver: set LEFT_BENCH_CHROMIUM and LEFT_BENCH_CHROMEDRIVER, or install both",
)


class Browser:
    """One page at a time in one headless Chromium."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, path: Path) -> None:
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.driver.get(path.as_uri())

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def into_view(self, element: WebElement) -> WebElement:
        self.run("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", element)
        return element

    def click(self, element: WebElement) -> None:
        self.into_view(element).click()

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map((n) => n.textContent)", selector)

    def rows(self) -> list[int]:
        """The table's rows, by their place in the sweep."""
        script = (
            "return [...document.querySelectorAll('#leaderboard tr[data-row]')].map((tr) => Number(tr.dataset.row))"
        )
        return self.run(script)

    def heading(self, name: str) -> WebElement:
        script = "return [...document.querySelectorAll('#leaderboard thead th button')].map((n) => n.firstChild.data)"
        return self.all("#leaderboard thead th")[self.run(script).index(name)]

    def requests(self) -> list[str]:
        """Every address asked for since the last time."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Errors and policy violations in the console since the last time."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def wait(self, condition: Any) -> Any:
        return WebDriverWait(self.driver, 30).until(lambda _: condition())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"),
        "--host-resolver-rules=MAP * ~NOTFOUND",  # whatever the page asked of a network would fail, and be seen
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=str(CHROMEDRIVER)))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def written(rows: list[Row], folder: Path, **more: Any) -> Path:
    return write_page(
        rows, **({"title": "a sweep", "path": folder / "page.html", "baseline": find_baseline(rows)} | more)
    )


METHODS = recorded_rows("methods")


@pytest.fixture
def page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Browser:
    path = tmp_path_factory.getbasetemp() / "methods.html"
    if not path.exists():
        write_page(METHODS, title="peft_methods", path=path, baseline=find_baseline(METHODS))
    browser.requests()
    browser.open(path)
    return browser


def ordered(metric: str, *, descending: bool) -> list[int]:
    """The rows as sorting by a metric must show them: those without a value last, in their own order."""
    values = [row.value(metric) for row in METHODS]
    have = [i for i, value in enumerate(values) if value is not None]
    have.sort(key=lambda i: (-(values[i] or 0) if descending else (values[i] or 0), i))
    return have + [i for i, value in enumerate(values) if value is None]


def test_the_page_loads_from_itself_alone(page: Browser) -> None:
    assert page.complaints() == []
    assert page.requests() == [page.driver.current_url]
    assert page.rows() == list(range(len(METHODS)))
    assert page.one("#count").text == "13 of 13 cells."
    text = page.one("#leaderboard").text
    for row in METHODS:
        assert status_of(row) in text
        assert row.reason is None or row.reason in page.one("body").get_attribute("textContent")
    assert page.one("#theme").is_displayed() and page.one("#plots").is_displayed()


def test_columns_sort_by_click_and_by_keyboard(page: Browser) -> None:
    heading = page.heading("exact match")
    page.click(heading.find_element(By.TAG_NAME, "button"))
    assert page.rows() == ordered("exact_match", descending=True)  # the best first
    assert heading.get_attribute("aria-sort") == "descending"
    assert "sorted by exact match, highest first" in page.one("#count").text
    button = page.run("return document.activeElement")
    button.send_keys(Keys.ENTER)
    assert page.rows() == ordered("exact_match", descending=False)
    assert heading.get_attribute("aria-sort") == "ascending"
    button.send_keys(Keys.SPACE)
    assert page.rows() == list(range(len(METHODS))) and heading.get_attribute("aria-sort") is None
    page.click(page.heading("peak memory").find_element(By.TAG_NAME, "button"))
    assert page.rows() == ordered("peak_memory_bytes", descending=False)  # less is better


def test_filters_narrow_table_and_plots(page: Browser) -> None:
    search = page.one("#query")
    search.send_keys("tuning OOM")
    assert [METHODS[i].status for i in page.rows()] == ["oom"]
    page.click(page.one("#clear"))
    assert len(page.rows()) == len(METHODS) and search.get_attribute("value") == ""
    menu = page.one("[data-filter='axis peft']")
    page.click(menu.find_element(By.TAG_NAME, "summary"))
    page.click(next(button for button in menu.find_elements(By.TAG_NAME, "button") if button.text == "None"))
    assert "No cell passes" in page.one("#leaderboard").text
    for label in menu.find_elements(By.TAG_NAME, "label"):
        if label.text.startswith(("lora", "dora")):
            page.click(label)
    chosen = [METHODS[i].record.choices["peft"] for i in page.rows() if METHODS[i].record]
    assert sorted(chosen) == ["dora", "lora"]
    assert menu.find_element(By.TAG_NAME, "summary").text.startswith("peft:")
    assert len(page.all("#scatter .point")) == len(page.all("#bars .bar")) == len(page.all("#loss .series")) == 2
    menu.find_element(By.TAG_NAME, "summary").send_keys(Keys.ESCAPE)
    assert menu.get_attribute("open") is None


def test_columns_are_chosen(page: Browser) -> None:
    page.click(page.one(".menu.columns summary"))
    before = len(page.all("#leaderboard thead th"))
    page.click(page.one("[data-column='base_exact_match']"))
    page.click(page.one("[data-column='axes']"))
    headings = [th.text.replace("\n", " ") for th in page.all("#leaderboard thead th")]
    assert len(headings) == before - 1 and any("exact match before training" in heading for heading in headings)
    assert "0.062" in page.one("#leaderboard").text


def points(page: Browser) -> dict[int, WebElement]:
    return {int(point.get_attribute("data-row")): point for point in page.all("#scatter .point")}


def assert_tip_of(page: Browser, i: int) -> None:
    tip = page.one("#tip")
    page.wait(tip.is_displayed)
    assert METHODS[i].cell_id in tip.text and METHODS[i].record is not None
    assert METHODS[i].record.provenance["command"] in tip.text
    assert "exact match" in tip.text and "peak memory" in tip.text
    box = page.run("const b = arguments[0].getBoundingClientRect(); return [b.left, b.right, innerWidth]", tip)
    assert box[0] >= 0 and box[1] <= box[2]


def test_hover_and_focus_show_the_cell_and_its_command(page: Browser) -> None:
    for i, point in points(page).items():
        ActionChains(page.driver).move_to_element(page.into_view(point)).perform()
        assert_tip_of(page, i)
        if i != list(points(page))[-1]:
            page.one("body").send_keys(Keys.ESCAPE)  # the tip may lie over the next point
    # the pointer may go into the tip, to its buttons
    ActionChains(page.driver).move_to_element(page.one("#tip button")).pause(0.4).perform()
    assert page.one("#tip").is_displayed()
    page.one("body").send_keys(Keys.ESCAPE)
    assert not page.one("#tip").is_displayed()
    ActionChains(page.driver).move_to_element(page.one("h1")).perform()
    [first] = page.all("#scatter .point[tabindex='0']")
    page.run("arguments[0].focus()", first)
    order = [int(first.get_attribute("data-row"))]
    assert_tip_of(page, order[0])
    for _ in range(len(points(page)) - 1):
        page.run("return document.activeElement").send_keys(Keys.ARROW_RIGHT)
        order.append(int(page.run("return document.activeElement.dataset.row")))
        assert_tip_of(page, order[-1])
    assert order == sorted(order, key=lambda i: METHODS[i].value("peak_memory_bytes") or 0)
    assert sorted(order) == sorted(i for i, row in enumerate(METHODS) if row.ok)


def test_one_cell_in_full_and_back(page: Browser) -> None:
    names = labels(METHODS, find_axes(METHODS))
    failed = next(i for i, row in enumerate(METHODS) if row.status == "failed" and row.record)
    opener = page.one(f"tr[data-row='{failed}'] th button")
    page.into_view(opener).send_keys(Keys.ENTER)
    dialog = page.one("#detail")
    assert dialog.is_displayed() and names[failed] in dialog.text
    assert "ValueError: total_step is 0" in dialog.text and "Traceback" in dialog.text
    dialog.send_keys(Keys.ESCAPE)
    page.wait(lambda: not dialog.is_displayed())
    assert page.run("return document.activeElement") == opener
    page.click(page.one("tr[data-row='1'] th button"))
    for fold in dialog.find_elements(By.CSS_SELECTOR, "details:not([open]) > summary"):
        page.click(fold)
    for told in ("State the final answer: 38 + 5 =", "peft.config.r", "evaluate_base", "sdpa", "AMD", "848 MiB"):
        assert (told in dialog.text) != (told == "AMD")  # the machine goes by its id
    page.run("document.querySelector('#detail .copy').click()")
    page.wait(lambda: "Copied" in dialog.text or "Could not copy" in dialog.text)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ("peak_memory_bytes", "exact_match"),
        ("train_tokens_per_second", "peak_memory_bytes"),
        ("wall_seconds", "eval_loss"),
    ],
)
def test_axes_are_chosen_and_the_front_is_the_reports_own(page: Browser, x: str, y: str) -> None:
    Select(page.one("#scatter-x")).select_by_value(x)
    Select(page.one("#scatter-y")).select_by_value(y)
    front = [int(point.get_attribute("data-row")) for point in page.all("#scatter .point.best")]
    if (x, y) == ("peak_memory_bytes", "exact_match"):  # the set, which counts rows and seeds
        members = pareto_set([row for row in METHODS if row.ok], [y, x])
        assert {i for i, row in enumerate(METHODS) if id(row) in members} == set(front)
        page.one("#query").send_keys("tuning")  # of a part of the cells, the front as measured
        drawn = [METHODS[i] for i in page.rows()]
        front = [int(point.get_attribute("data-row")) for point in page.all("#scatter .point.best")]
        assert {METHODS[i].cell_id for i in front} == {row.cell_id for row in pareto_front(drawn, y, x)}
        return
    if x == "train_tokens_per_second":
        x, y = y, x  # pareto_front takes what is to be kept low second
    expected = pareto_front(METHODS, y, x)
    assert {METHODS[i].cell_id for i in front} == {row.cell_id for row in expected}


def test_an_axis_of_many_sizes_is_logarithmic(page: Browser) -> None:
    assert not page.one("#log-x").is_selected()
    Select(page.one("#scatter-x")).select_by_value("trainable_params")  # 11.5 k to 135 M
    assert page.one("#log-x").is_selected()

    def middle(point: WebElement) -> float:
        return float(point.rect["x"] + point.rect["width"] / 2)

    placed = {i: middle(point) for i, point in points(page).items()}
    assert sorted(placed, key=placed.__getitem__) == sorted(
        placed, key=lambda i: METHODS[i].value("trainable_params") or 0
    )
    widest = max(placed.values()) - min(placed.values())
    page.click(page.one("#log-x"))
    linear = sorted(middle(point) for point in points(page).values())
    assert linear[-2] - linear[0] < 0.1 * (linear[-1] - linear[0]) and widest > 300  # all but one in a heap


def test_light_dark_and_the_choice_between_them(page: Browser) -> None:
    def paper() -> str:
        return str(page.run("return getComputedStyle(document.body).backgroundColor"))

    def system(scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    system("dark")
    dark = paper()
    system("light")
    light = paper()
    assert light == "rgb(255, 255, 255)" != dark
    button = page.one("#theme")
    button.click()
    assert (button.text, paper()) == ("Theme: light", light)
    button.click()
    assert (button.text, paper()) == ("Theme: dark", dark)
    button.click()
    assert (button.text, paper()) == ("Theme: auto", light)


def test_the_scatter_is_within_ten_tab_stops(page: Browser) -> None:
    for _ in range(10):
        page.run("return document.activeElement").send_keys(Keys.TAB)
        if page.run("return document.activeElement.classList.contains('point')"):
            break
    assert page.run("return document.activeElement.classList.contains('point')")


def test_places_and_the_pareto_set_are_columns_and_a_filter(page: Browser) -> None:
    result = recommend(METHODS)
    ranked = standing(METHODS, "exact_match")
    assert result is not None and ranked is not None
    script = "return [...document.querySelectorAll('#leaderboard thead th button')].map((n) => n.firstChild.data)"
    names = page.run(script)
    lines = {int(tr.get_attribute("data-row")): tr for tr in page.all("#leaderboard tr[data-row]")}
    for i, row in enumerate(METHODS):
        cells = [cell.text for cell in lines[i].find_elements(By.CSS_SELECTOR, "th,td")]
        assert cells[names.index("#")] == str(ranked.places.get(id(row), "–"))
        assert bool(cells[names.index("Pareto set")]) == (id(row) in result.front)
    menu = page.one(".menu.filter[data-filter='pareto']")
    page.click(menu.find_element(By.TAG_NAME, "summary"))
    no = next(box for box in menu.find_elements(By.TAG_NAME, "label") if box.text.startswith("no"))
    page.click(no)
    assert {id(METHODS[i]) for i in page.rows()} == set(result.front)


def test_a_view_is_sent_by_its_address(page: Browser) -> None:
    page.click(page.heading("exact match").find_element(By.TAG_NAME, "button"))
    page.one("#query").send_keys("tuning")
    Select(page.one("#scatter-x")).select_by_value("wall_seconds")
    page.click(page.one("#log-y"))
    page.click(page.one(".menu.columns summary"))
    page.click(page.one("[data-column='eval_loss']"))
    menu = page.one(".menu.filter[data-filter='status']")
    page.click(menu.find_element(By.TAG_NAME, "summary"))
    page.click(menu.find_elements(By.TAG_NAME, "label")[0])
    seen, heads = page.rows(), page.texts("#leaderboard thead th")
    address = page.run("return location.href")
    assert "#" in address and seen and len(seen) < len(METHODS)
    page.driver.get("about:blank")
    page.driver.get(address)
    assert page.rows() == seen and page.texts("#leaderboard thead th") == heads
    assert page.one("#query").get_attribute("value") == "tuning" and page.one("#log-y").is_selected()
    assert page.one("#scatter-x").get_attribute("value") == "wall_seconds"
    page.driver.get(address.partition("#")[0] + "#sort=metric+no_such_metric+down&x=%3Cscript%3E&filter=nothing")
    page.driver.refresh()
    assert page.rows() == list(range(len(METHODS))) and not page.complaints()


def test_curves_are_read_by_keyboard(page: Browser) -> None:
    chart = page.one("#loss svg")
    page.run("arguments[0].focus()", chart)
    names = labels(METHODS, find_axes(METHODS))
    first = page.one("#loss-readout").text
    assert any(first.startswith(f"{name}: step ") for name in names)
    chart.send_keys(Keys.ARROW_RIGHT)
    second = page.one("#loss-readout").text
    assert second != first and second.partition(":")[0] == first.partition(":")[0]
    page.one("#loss svg").send_keys(Keys.ARROW_DOWN)
    assert page.one("#loss-readout").text.partition(":")[0] != first.partition(":")[0]
    assert len(page.all("#loss .series.mark")) == 1


def curve_rows() -> list[Row]:
    """Three methods, two seeds each, whose validation loss and score along training are known."""
    records = []
    for n, method in enumerate(("lora", "ia3", "full")):
        for seed in (0, 1):
            made = make_record(changes=peft(method) | {"seed": seed}, minute=seed)
            points = [
                CurvePoint(
                    step=5 * k,
                    seconds=(n + 1.0) * 5 * k,
                    tokens=500 * k,
                    validation_loss=3 / k + n / 10 + seed / 20,
                    scores={"exact_match": k / 10},
                )
                for k in range(1, 5)
            ]
            records.append(made.model_copy(update={"curve": points}))
    return pool([row_of(record) for record in records])


def test_quality_along_training_is_drawn_over_what_is_chosen_and_read_by_keyboard(
    browser: Browser, tmp_path: Path
) -> None:
    rows = curve_rows()
    browser.open(written(rows, tmp_path))
    assert len(browser.all("#along .series")) == 3 == len(browser.all("#along .band"))
    over = [option.get_attribute("value") for option in Select(browser.one("#along-over")).options]
    assert over == ["seconds", "tokens", "step"]  # no joules were measured
    assert "seconds of training" in browser.one("#along").text
    Select(browser.one("#along-over")).select_by_value("tokens")
    Select(browser.one("#along-metric")).select_by_value("exact_match")
    chart = browser.one("#along svg")
    browser.run("arguments[0].focus()", chart)
    chart.send_keys(Keys.END)
    name = labels(rows, find_axes(rows))[0]
    assert browser.one("#along-readout").text.startswith(f"{name}: 2,000 tokens of training, exact match 0.4")
    Select(browser.one("#along-metric")).select_by_value("validation_loss")
    browser.run("arguments[0].focus()", browser.one("#along svg"))
    browser.one("#along svg").send_keys(Keys.ARROW_DOWN)
    readout = browser.one("#along-readout").text
    assert readout.endswith("validation loss 3.125 (seeds 3.1 to 3.15)")
    address = browser.run("return location.href")
    browser.driver.get("about:blank")
    browser.driver.get(address)
    assert browser.one("#along-over").get_attribute("value") == "tokens"
    assert not browser.complaints()


def test_trials_of_a_tuning_are_drawn_in_their_methods_colour(browser: Browser, tmp_path: Path) -> None:
    def tuned(rate: float) -> dict[str, Any]:
        tried = [{"learning_rate": rate * step, "validation_loss": 1 + step} for step in (0.1, 1, 3)]
        tried.append({"learning_rate": rate * 10, "ended": "diverged"})
        return {"tuned": {"trials": 4, "learning_rate": rate, "validation_loss": 2.0, "tried": tried}}

    rows = [
        row_of(make_record(changes=peft(method), provenance=tuned(rate)))
        for method, rate in (("lora", 1e-3), ("ia3", 1e-2))
    ]
    rows.append(row_of(make_record(changes=peft("vera"))))
    browser.complaints()
    browser.open(written(rows, tmp_path))
    assert len(browser.all("#rates svg g")) == 2
    assert len(browser.all("#rates .point")) == 6 and len(browser.all("#rates .point.best")) == 2
    assert browser.texts("#rates-legend button") == ["lora", "ia3"]
    own = {i: f"c{style.colour}" for i, style in enumerate(row_styles(rows))}
    for group in browser.all("#rates svg g"):
        line = group.find_element(By.TAG_NAME, "polyline")
        assert own[int(group.get_attribute("data-row") or "")] in (line.get_attribute("class") or "").split()
    assert "Crosses above" in browser.one("#rates-note").text
    browser.one("#query").send_keys("ia3")
    assert len(browser.all("#rates svg g")) == 1
    assert browser.complaints() == []


def test_tables_by_axis_hold_the_blocks_of_the_report(browser: Browser, tmp_path: Path) -> None:
    rows = [
        row_of(make_record(changes=peft(method) | {"quantization.name": name}, choices={"quantization": name}))
        for method in ("lora", "ia3")
        for name in ("none", "nf4")
    ]
    browser.open(written(rows, tmp_path))
    assert browser.texts("#by-axis h2") == ["By quantization", "By peft"]
    tables = browser.all("#by-axis table")
    assert [len(table.find_elements(By.TAG_NAME, "tbody")) for table in tables] == [2, 2]
    assert [len(table.find_elements(By.CSS_SELECTOR, "tr.reference")) for table in tables] == [2, 2]


@pytest.mark.parametrize("width", [320, 360])
def test_a_phone_scrolls_tables_in_their_own_box(page: Browser, width: int) -> None:
    size = {"width": width, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.driver.refresh()
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert len(page.all("#leaderboard thead th.number")) == 1 + 3  # the place and three metrics
    box, first = page.one("#leaderboard-box"), page.one("#leaderboard tbody th")
    inside, seen = page.run("return [arguments[0].scrollWidth, arguments[0].clientWidth]", box)
    assert inside > seen and first.rect["width"] < width / 2
    page.run("arguments[0].scrollLeft = 200", box)
    assert abs(first.rect["x"] - box.rect["x"]) <= 1  # the first column stays
    for point in page.all("#scatter .point"):
        assert point.rect["x"] >= 0 and point.rect["x"] + point.rect["width"] <= width
        page.run("arguments[0].focus()", point)
        page.wait(page.one("#tip").is_displayed)
        tip = page.one("#tip").rect
        assert tip["x"] >= 0 and tip["x"] + tip["width"] <= width
    assert page.run("return document.documentElement.scrollWidth") <= width


def test_without_a_script_the_table_is_there(page: Browser) -> None:
    page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.driver.refresh()
        assert "need JavaScript" in page.one("noscript").text and len(page.all("#leaderboard tbody tr")) == len(METHODS)
        assert not page.one("#plots").is_displayed()
    finally:
        page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_hostile_records_are_text_and_nothing_else(browser: Browser, tmp_path: Path) -> None:
    rows = [row_of(hostile_record(HOSTILE[turn:] + HOSTILE[:turn])) for turn in range(len(HOSTILE))]
    rows += [row_of(make_record(status="failed", reason=text, changes=peft(text))) for text in HOSTILE]
    browser.requests()
    browser.complaints()
    browser.open(written(rows, tmp_path, title=HOSTILE[0], notes=[HOSTILE[2]]))
    assert browser.driver.title == HOSTILE[0]
    assert len(browser.rows()) == len(rows)
    for i, point in points(browser).items():
        browser.run("arguments[0].focus()", point)
        assert one_line(rows[i].cell_id) in browser.one("#tip h3, #tip").text
    for i in range(len(rows)):
        browser.run("document.querySelector(`tr[data-row='${arguments[0]}'] th button`).click()", i)
        assert one_line(rows[i].cell_id) in browser.one("#detail").text
        browser.run("document.querySelector('#detail').close()")
    menu_texts = "".join(browser.texts(".menu label"))
    assert HOSTILE[0] in menu_texts
    browser.one("#query").send_keys("<svg onload")
    assert 0 < len(browser.rows()) < len(rows)
    made = browser.run("return [...document.querySelectorAll('*')].map((n) => n.tagName.toLowerCase())")
    assert not {"img", "iframe", "image", "object", "embed", "link"} & set(made) and made.count("script") == 2
    attributes = browser.run("return [...document.querySelectorAll('*')].flatMap((n) => n.getAttributeNames())")
    assert not [name for name in attributes if name.startswith("on")]
    assert browser.complaints() == [] and browser.requests() == [browser.driver.current_url.partition("#")[0]]
    with pytest.raises(Exception, match="no such alert"):
        browser.driver.switch_to.alert  # noqa: B018


def test_thousands_of_cells_come_a_page_at_a_time(browser: Browser, tmp_path: Path) -> None:
    rows = [
        row_of(make_record(changes=peft(f"method_{n % 50}") | {"seed": n // 50}, exact_match=(n * 7919 % 1700) / 1700,
            peak_mib=500 + n * 104729 % 3000))
        for n in range(1700)
    ]  # fmt: skip
    browser.open(written(rows, tmp_path))
    assert browser.rows() == list(range(200)) and browser.one("#count").text == "1,700 of 1,700 cells, rows 1 to 200."
    browser.click(next(button for button in browser.all("#pages button") if button.text == "Last"))
    assert browser.rows() == list(range(1600, 1700))
    browser.click(browser.heading("exact match").find_element(By.TAG_NAME, "button"))
    assert rows[browser.rows()[0]].value("exact_match") == max(row.value("exact_match") or 0 for row in rows)
    assert (
        len(browser.all("#scatter .point")) == 1500
        and "1,500 of 1,700 cells are drawn" in browser.one("#scatter-note").text
    )
    browser.one("#query").send_keys("method_7 ")
    assert {row.record.choices["peft"] for i in browser.rows() if (row := rows[i]).record} == {"method_7"}
    assert browser.one("#count").text.startswith("34 of 1,700 cells")
