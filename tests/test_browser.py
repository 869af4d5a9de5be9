"""The report in a real browser: click a head, and the viewer shows it."""

from __future__ import annotations

import shutil

import pytest

pytestmark = pytest.mark.browser
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def page(request, tmp_path_factory):
    if not CHROMIUM or not DRIVER:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    out, _ = request.getfixturevalue("scanned")  # not made where there is no browser to look at it
    options = Options()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--window-size=1280,2400",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.get((out / "report.html").as_uri())
    yield driver
    driver.quit()


def find(page, selector):
    return page.find_elements("css selector", selector)


def test_the_map_has_every_head(page):
    assert len(find(page, "#map [data-head]")) == 64
    assert len(find(page, "#findings .finding")) >= 4
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def test_clicking_a_head_shows_where_it_looks(page):
    find(page, '#map [data-head="L5H7"]')[0].click()
    assert find(page, "#viewer-head")[0].text == "L5H7"
    assert find(page, "#card h3")[0].text == "L5H7"
    assert "previous token" in find(page, "#card .note")[0].text
    find(page, '#tokens [data-i="30"]')[0].click()
    weights = {int(t.get_attribute("data-i")): float(t.get_attribute("data-weight")) for t in find(page, "#tokens .tok")}
    assert max(weights, key=weights.get) == 29  # a previous-token head looks one back
    assert weights[29] > 0.9
    assert find(page, "#tokens .query")[0].get_attribute("data-i") == "30"
    assert all(w == 0 for i, w in weights.items() if i > 30)


def test_an_induction_head_looks_behind_the_earlier_copy(page):
    find(page, '#map [data-head="L7H3"]')[0].click()
    tokens = [t.get_attribute("textContent") for t in find(page, "#tokens .tok")]
    places = [i for i, text in enumerate(tokens) if text == " falcon" or text.endswith("con")]
    first, second = places[0], places[-1]
    assert tokens[first] == tokens[second]
    find(page, f'#tokens [data-i="{second}"]')[0].click()
    weights = {int(t.get_attribute("data-i")): float(t.get_attribute("data-weight")) for t in find(page, "#tokens .tok")}
    assert max(weights, key=weights.get) == first + 1


def test_tabs_change_the_map(page):
    find(page, '#probe-tabs [data-probe="induction"]')[0].click()
    assert "after the earlier copy" in find(page, "#probe-about")[0].text
    shades = {c.get_attribute("data-head"): c.value_of_css_property("background-color") for c in find(page, "#map [data-head]")}
    assert shades["L7H3"] != shades["L0H0"]
    assert find(page, '#map [data-head="L7H3"]')[0].get_attribute("title").startswith("L7H3: 0.9")


def test_keys_move_between_heads(page):
    cell = find(page, '#map [data-head="L3H3"]')[0]
    cell.click()
    from selenium.webdriver.common.keys import Keys

    find(page, '#map [data-head="L3H3"]')[0].send_keys(Keys.ARROW_DOWN)
    assert find(page, "#viewer-head")[0].text == "L4H3"
    find(page, '#map [data-head="L4H3"]')[0].send_keys(Keys.ARROW_RIGHT)
    assert find(page, "#viewer-head")[0].text == "L4H4"


def test_a_finding_leads_to_its_head(page):
    chip = find(page, "#findings .chip")[0]
    name = chip.text
    chip.click()
    assert find(page, "#viewer-head")[0].text == name


def test_nothing_is_requested(page):
    requested = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert requested == []
