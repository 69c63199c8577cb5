"""The reports in a real browser, from a file and without a network."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path

import pytest
from report_folders import METHODS, write_study
from tiny_runs import make_place
from tiny_runs import run as train

from speft_kernels.report import write_report

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
LONG = "a rather long name of a method, " * 4
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = "no browser: chromium or chromedriver is not installed"
        if os.environ.get("SPEFT_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    chrome = webdriver.Chrome(options=options, service=service)
    chrome.set_window_size(1200, 900)
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The report of a study with names that try to be code, or are too long."""
    # As words, 0.005 would come after 0.01.
    methods = {**METHODS, LONG: {"method": "lora", "density": 0.005}, HOSTILE: METHODS["magnitude"]}
    folder = tmp_path_factory.mktemp("study") / "study"
    write_study(folder, tasks=("sst2", HOSTILE), methods=methods, name=HOSTILE, layers=2)
    (folder / "runs" / "0-1-0.01-0" / "metrics.jsonl").write_text("not JSON\n{}\n")
    return write_report(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The report of a real run whose settings try to be code, or are too long."""
    place = tmp_path_factory.mktemp("place")
    output = place / "run"
    train(make_place(place), output)
    config = json.loads((output / "config.json").read_text())
    config["settings"] |= {"train": HOSTILE, HOSTILE: LONG, "model": LONG.replace(" ", "-")}
    (output / "config.json").write_text(json.dumps(config))
    return write_report(output)


@pytest.fixture
def page(browser, study):
    return opened(browser, study)


@pytest.fixture(params=["study", "run"])
def kind(request):
    return request.param


@pytest.fixture
def each(browser, kind, request):
    return opened(browser, request.getfixturevalue(kind))


def opened(browser, report):
    """The browser with the report loaded anew, and what it logged and asked for."""
    emulate(browser, "light")
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(report.as_uri())
    return browser


def emulate(browser, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def requests(browser):
    """The addresses asked for since the log was last read."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    return [event["params"]["request"]["url"] for event in sent]


def test_it_loads_without_a_complaint_or_a_request(each, kind, request):
    assert each.get_log("browser") == []
    address = request.getfixturevalue(kind).as_uri()
    assert [url for url in requests(each) if not url.startswith("data:,")] == [address]
    assert each.title == {"study": f"Study {HOSTILE}", "run": "Run run"}[kind]
    assert each.execute_script("return document.querySelector('img, iframe, object')") is None
    assert each.execute_script("return document.scripts.length") == 1


def test_the_policy_stops_what_escaping_would_have_missed(page, tmp_path, study):
    html = study.read_text(encoding="utf-8")
    for number, injected in enumerate(
        (
            "<script>document.title = 'broken'</script>",
            "<img src=x onerror=\"document.title = 'broken'\">",
        )
    ):
        other = tmp_path / f"{number}.html"
        other.write_text(html.replace("<main>", f"<main>{injected}", 1), encoding="utf-8")
        page.get(other.as_uri())
        assert page.title == f"Study {HOSTILE}"
        assert page.get_log("browser") != []  # the browser says what it refused


def test_every_figure_is_drawn(each, kind):
    figures = each.execute_script(
        """return Array.from(document.querySelectorAll("figure svg"), (svg) => {
            const box = svg.getBoundingClientRect();
            const outside = Array.from(svg.querySelectorAll("text"), (text) => {
              const t = text.getBoundingClientRect();
              return t.left < box.left - 1 || t.right > box.right + 1
                || t.top < box.top - 1 || t.bottom > box.bottom + 1;
            });
            const sizes = Array.from(svg.querySelectorAll("path, use"), (path) => {
              const box = path.getBoundingClientRect();
              return box.width + box.height;
            });
            return {
              name: svg.querySelector("title").textContent,
              width: box.width, height: box.height,
              drawn: sizes.filter((size) => size > 0).length,
              outside: outside.filter(Boolean).length,
              label: document.getElementById(svg.getAttribute("aria-labelledby")) !== null,
            };
        })"""
    )
    expected = {
        "study": 2 + 2 * 2 + 1 + 1,  # scores, densities; masks of two tasks; loss; cost
        "run": 3,  # loss and rate; evaluations; the mask
    }
    assert len(figures) == expected[kind]
    for figure in figures:
        assert figure["width"] > 200, figure
        assert figure["height"] > 100, figure
        assert figure["drawn"] > 10, figure
        assert figure["outside"] == 0, figure
        assert figure["name"], figure
        assert figure["label"], figure


def column(page, table, index):
    return page.execute_script(
        """return Array.from(arguments[0].tBodies[0].rows, (row) => {
             const cell = row.cells[arguments[1]];
             return [cell.textContent, cell.dataset.value ?? null];
           })""",
        table,
        index,
    )


def states(page, table):
    return page.execute_script(
        "return Array.from(arguments[0].tHead.rows[0].cells, (c) => c.getAttribute('aria-sort'))",
        table,
    )


def test_a_press_on_a_header_sorts(page):
    from selenium.webdriver.common.keys import Keys

    table = page.find_element("css selector", "table")  # of the results
    buttons = table.find_elements("css selector", "th button")
    assert states(page, table) == ["none"] * len(buttons)

    buttons[1].click()  # the trained share: 100 % is more than 7 %, whatever the text says
    values = [float(value) for _, value in column(page, table, 1)]
    assert values == sorted(values)
    assert values[-1] == 1.0
    assert states(page, table)[:3] == ["none", "ascending", "none"]

    buttons[1].send_keys(Keys.ENTER)
    assert [float(value) for _, value in column(page, table, 1)] == values[::-1]
    assert states(page, table)[:3] == ["none", "descending", "none"]

    buttons[0].click()
    names = [text for text, _ in column(page, table, 0)]
    assert names[-2:] == ["lora", "magnitude"]
    assert states(page, table)[:3] == ["ascending", "none", "none"]
    assert page.get_log("browser") == []


def test_a_press_on_a_header_sorts_the_tables_of_a_run(browser, run):
    page = opened(browser, run)
    found = {}
    for table in page.find_elements("css selector", "table"):
        buttons = table.find_elements("css selector", "th button")
        if buttons:  # tables of facts have no headers to press
            found[buttons[0].get_attribute("textContent")] = (table, buttons)
    for title, index in (("step", 0), ("layer", 3)):
        table, buttons = found[title]
        before = [float(value) for _, value in column(page, table, index)]
        assert len(set(before)) > 1
        for direction, expected in (
            ("ascending", sorted(before)),
            ("descending", sorted(before, reverse=True)),
        ):
            page.execute_script("arguments[0].click()", buttons[index])
            assert [float(value) for _, value in column(page, table, index)] == expected
            assert states(page, table)[index] == direction
    assert page.get_log("browser") == []


def test_empty_cells_stay_last(page):
    table = page.find_elements("css selector", "table")[-2]  # of all runs
    title = "salience peak memory bytes"
    buttons = table.find_elements("css selector", "th button")
    index = next(i for i, b in enumerate(buttons) if b.get_attribute("textContent") == title)
    for _ in range(2):
        page.execute_script("arguments[0].click()", buttons[index])
        empty = [value is None for _, value in column(page, table, index)]
        assert any(empty)
        assert empty == sorted(empty)


@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable_and_no_wider_than_the_page(each, tmp_path, scheme, width):
    page = each
    emulate(page, scheme)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.execute_script("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        assert page.execute_script(
            "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        colours = page.execute_script(
            """const of = (e, name) => getComputedStyle(e)[name].match(/[0-9.]+/g).map(Number);
            const text = document.querySelector("figure svg text");
            return [of(document.body, "backgroundColor"), of(document.body, "color"),
                    of(text, "fill"), text.getBoundingClientRect().height];"""
        )
        ground, words, drawn, height = colours
        assert (sum(ground) > 600) == (scheme == "light")
        for ink in (words, drawn):
            assert abs(sum(ground[:3]) - sum(ink[:3])) > 400
        assert height >= 9
        shot = page.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        Path(tmp_path / f"{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_scripts_everything_is_still_there(browser, study):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(study.as_uri())
        document = browser.execute_cdp_cmd("DOM.getDocument", {"depth": 1})
        html = browser.execute_cdp_cmd("DOM.getOuterHTML", {"nodeId": document["root"]["nodeId"]})
        shown = html["outerHTML"]
        assert "<button" not in shown
        assert shown.count("<table") == shown.count("</table>") > 5
        assert "gradient, sparser" in shown
        assert 'data-sort="number"' in shown
        visible = browser.find_element("css selector", "main").text
        for heading in ("Results", "Learning rates", "Where the masks lie", "Cost", "All runs"):
            assert heading in visible
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
