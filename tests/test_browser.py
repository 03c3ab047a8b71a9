"""What a person sees, in a real headless Chromium: the results page of a large run, and the page of `jaxzs app`.

Skipped where Chromium, its driver, selenium or Gradio is absent; the step `browser` of .ci/run brings them all.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from jaxzs.report import write_page

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium here: pip install selenium")
from selenium.common import exceptions  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium here: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)
PATIENCE = 120  # seconds, on a loaded machine; every wait ends as soon as there is something to see


@pytest.fixture
def browser(tmp_path, request) -> Iterator[Any]:
    """A fresh Chromium, which has met no error in any script when the test ends. param: "dark" or "light"."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
        errors = [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"]
        assert not errors, errors
    finally:
        driver.quit()


def soon(found: Callable[[], Any], what: str) -> Any:
    """Waits until something is true, and returns it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {PATIENCE} s")


def clicked(element: Callable[[], Any]) -> None:
    """Clicks what is found, once nothing moves any more and nothing lies over it."""

    def done() -> bool:
        try:
            element().click()
        except (exceptions.ElementNotInteractableException, exceptions.StaleElementReferenceException):
            return False
        except exceptions.ElementClickInterceptedException:
            return False
        return True

    soon(done, "a click")


def photographed(browser: Any, name: str) -> None:
    """A screenshot for a person to look at, where JAXZS_SCREENSHOTS names a folder."""
    if folder := os.environ.get("JAXZS_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def scheme(browser: Any, value: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": value}]}
    )


# --- the results page ---------------------------------------------------------------------------------------------

TEN_THOUSAND = 10_000


@pytest.fixture(scope="module")
def large_page(tmp_path_factory) -> Path:
    """Of 10,000 images, 300 of them in a file; 20 classes; every seventh is wrong."""
    folder = tmp_path_factory.mktemp("large")
    names = [f"class {number}" for number in range(20)]
    random = np.random.default_rng(0)
    for number in range(300):
        Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).resize((96, 72)).save(folder / f"{number}.png")
    rows = []
    for number in range(TEN_THOUSAND):
        truth = names[number % 20]
        label = names[(number + 1) % 20] if number % 7 == 0 else truth
        score = round(0.2 + 0.8 * (number % 1000) / 1000, 4)
        top = [{"label": label, "score": score}, {"label": names[(number + 5) % 20], "score": round(1 - score, 4)}]
        rows.append({"path": str(folder / f"{number}.png"), "label": label, "score": score, "top": top, "truth": truth})
    record = {"command": "jaxzs classify photos", "class_names": names, "results": rows, "unreadable": []}
    return write_page(folder / "page.html", record).path


def count(browser: Any) -> str:
    return browser.find_element(By.ID, "count").text


def test_ten_thousand_images(browser, large_page):
    started = time.monotonic()
    browser.get(large_page.as_uri())
    assert count(browser) == "10,000 images"
    assert time.monotonic() - started < 60, "opening it; a second on a free machine"
    cards = len(browser.find_elements(By.CSS_SELECTOR, ".card"))
    assert 60 <= cards < 1000, "cards are made as one scrolls"
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    soon(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".card")) > cards, "more cards")
    photographed(browser, "results-10000")


def test_filters(browser, large_page):
    browser.get(large_page.as_uri())
    browser.find_element(By.ID, "text").send_keys("class 7")
    soon(lambda: count(browser) != "10,000 images", "a filter by text")
    clicked(lambda: browser.find_element(By.CSS_SELECTOR, "form [type=reset]"))
    soon(lambda: count(browser) == "10,000 images", "all again")
    choose(browser, "answer", "wrong")
    soon(lambda: count(browser) == "1,429 of 10,000 images", "every seventh")
    choose(browser, "true", "class 3")
    soon(lambda: count(browser) == "71 of 10,000 images", "those of a class")
    # The same by the cell of the confusion matrix.
    clicked(lambda: browser.find_element(By.CSS_SELECTOR, "form [type=reset]"))
    cell = browser.find_element(By.CSS_SELECTOR, '.confusion [data-true="3"][data-class="4"]')
    assert cell.text == "71"
    cell.send_keys(Keys.ENTER)  # a click would have to wait until the page has scrolled to it
    soon(lambda: count(browser) == "71 of 10,000 images", "the images of a cell")


def choose(browser: Any, name: str, text: str) -> None:
    field = browser.find_element(By.ID, name)
    clicked(lambda: next(one for one in field.find_elements(By.TAG_NAME, "option") if one.text == text))


def test_keys_alone(browser, large_page):
    """Skip link, filters, a card, the next image, and back to where one was."""
    browser.get(large_page.as_uri())
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to the images"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    for _ in range(30):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        if "card" in (browser.switch_to.active_element.get_attribute("class") or ""):
            break
    card = browser.switch_to.active_element
    assert card.get_attribute("data-place") == "0"
    outline = card.value_of_css_property("outline-style")
    assert outline == "solid", "where the keyboard is can be seen"
    card.send_keys(Keys.ENTER)
    dialog = browser.find_element(By.ID, "detail")
    assert dialog.get_attribute("open")
    photographed(browser, "results-one-image")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert browser.find_element(By.ID, "d-place").text == "2 of 10,000"
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    soon(lambda: not dialog.get_attribute("open"), "the dialog closed")
    # The dialog tells that it is closed in a task of its own.
    soon(lambda: browser.switch_to.active_element.get_attribute("data-place") == "1", "focus on the image seen last")


@pytest.fixture(scope="module")
def small_page(tmp_path_factory) -> Path:
    """Of three images, one wrong; a name that is long, and one that is written from the right."""
    folder = tmp_path_factory.mktemp("small")
    names = ["cat", "שלום", "a long name that goes on and on: organ grinder, hurdy-gurdy player"]
    rows = []
    for number, name in enumerate(names):
        file = folder / name[:20] / f"{name[:20]}-{number}.png"
        file.parent.mkdir()
        Image.new("RGB", (60, 40), (90 * number, 90, 90)).save(file)
        top = [{"label": names[n], "score": 0.6 - 0.2 * k} for k, n in enumerate((number % 2, 2, 1 - number % 2))]
        rows.append({"path": str(file), "label": top[0]["label"], "score": 0.6, "top": top, "truth": name})
    record = {"command": "jaxzs classify photos", "class_names": names, "results": rows, "unreadable": []}
    return write_page(folder / "page.html", record).path


def test_few_images_have_a_way_back(browser, small_page):
    """Filters are hidden where nobody needs them, until a class is chosen in the table."""
    browser.get(small_page.as_uri())
    show_all = browser.find_element(By.CSS_SELECTOR, "form [type=reset]")
    assert not show_all.is_displayed()
    browser.find_element(By.CSS_SELECTOR, ".classes [data-class='1']").send_keys(Keys.ENTER)
    soon(lambda: count(browser) == "1 of 3 images", "the images of a class")
    show_all.send_keys(Keys.ENTER)
    soon(lambda: count(browser) == "3 images", "all again")
    browser.find_element(By.ID, "text").send_keys("nowhere")
    soon(lambda: count(browser) == "none of 3 images is like that", "what is not there is said")


def test_the_last_image_keeps_the_keyboard(browser, small_page):
    browser.get(small_page.as_uri())
    browser.find_element(By.CSS_SELECTOR, ".card").send_keys(Keys.ENTER)
    place, following = browser.find_element(By.ID, "d-place"), browser.find_element(By.ID, "d-next")
    for expected in ("2 of 3", "3 of 3", "3 of 3"):
        following.send_keys(Keys.ENTER)
        assert place.text == expected
    assert browser.switch_to.active_element == following
    assert following.get_attribute("aria-disabled") == "true"
    browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert place.text == "2 of 3"
    for cell in browser.find_elements(By.CSS_SELECTOR, "#d-labels .n"):
        assert browser.execute_script(LINES, cell) == 1, "a number is not broken"


def test_everything_has_a_name(browser, small_page):
    """For those who hear the page: tables, fields and buttons in the tree that screen readers are given."""
    browser.get(small_page.as_uri())
    browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    browser.execute_script("document.getElementById('filters').classList.remove('unneeded')")
    roles = {"table", "button", "textbox", "searchbox", "combobox", "spinbutton", "search", "region", "link"}
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if "role" in node]
    assert {role for role, _ in found} > {"table", "button", "combobox", "spinbutton", "region"}
    assert not [role for role, name in found if role in roles and not name.strip()]
    regions = [name for role, name in found if role == "region"]
    assert len(regions) == len(set(regions))


def test_names_written_from_the_right(browser, small_page):
    """The folder stays before the file."""
    browser.get(small_page.as_uri())
    card = next(c for c in browser.find_elements(By.CSS_SELECTOR, ".card") if "שלום" in c.get_attribute("title"))
    folder, file = card.find_elements(By.CSS_SELECTOR, ".file bdi")
    assert (folder.text, file.text) == ("שלום", "שלום-1.png")
    assert folder.location["x"] < file.location["x"]


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_cells_of_the_confusion_are_legible(browser, small_page, colours):
    scheme(browser, colours)
    browser.get(small_page.as_uri())
    for kind in ("right", "wrong"):
        cell = browser.find_element(By.CSS_SELECTOR, f".confusion td.{kind}:has(button)")
        # The page mixes the ground in a colour space of its own: what is painted is asked for.
        ground, ink = browser.execute_script(PAINTED, cell)
        light, dark = sorted((luminance(ground), luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (kind, ground, ink)


LINES = "const r = document.createRange(); r.selectNodeContents(arguments[0]); return r.getClientRects().length"
PAINTED = """
const style = getComputedStyle(arguments[0]), context = document.createElement("canvas").getContext("2d");
return [style.backgroundColor, style.color].map((colour) => {
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return `rgb(${[...context.getImageData(0, 0, 1, 1).data].slice(0, 3)})`;
});
"""


def test_light_and_dark(browser, large_page):
    """Text is told from its ground in both: WCAG's contrast of 4.5."""
    for value, is_light in (("light", True), ("dark", False)):
        scheme(browser, value)
        browser.get(large_page.as_uri())
        photographed(browser, f"results-{value}")
        ground = luminance(browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"))
        assert (ground > 0.5) == is_light
        for selector in ("h1", ".quiet", ".facts dt", ".card .file", ".verdict.wrong", ".link", "label"):
            ink = luminance(browser.find_element(By.CSS_SELECTOR, selector).value_of_css_property("color"))
            contrast = (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05)
            assert contrast >= 4.5, (value, selector, contrast)


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(1, 2, 3)", by WCAG 2."""
    parts = np.array([float(part) for part in re.findall(r"[\d.]+", colour)[:3]]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_on_a_telephone(browser, large_page):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    browser.get(large_page.as_uri())
    photographed(browser, "results-telephone")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390, "nothing sticks out"
    form = browser.find_element(By.ID, "filters")
    assert form.value_of_css_property("position") == "static", "it would cover what it filters"


# --- the app ------------------------------------------------------------------------------------------------------


_HEARS_CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from jaxzs.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[str]:
    """Address of `jaxzs app` in a process of its own, as a person starts it."""
    pytest.importorskip("gradio", reason="no gradio here: pip install 'jaxzs[app]'")
    log = tmp_path_factory.mktemp("app") / "log"
    with log.open("w") as file:
        # A shell that runs the tests in the background has them ignore Ctrl-C, and the server would inherit that.
        server = subprocess.Popen(
            [sys.executable, "-u", "-c", _HEARS_CTRL_C, "app", "--labels", "zero, one, two"],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            found = soon(lambda: re.search(r"http://\S+", log.read_text()) or server.poll(), "the address")
            assert server.poll() is None, log.read_text()
            yield found[0]
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()


def buttons(browser: Any, name: str) -> list[Any]:
    found = browser.find_elements(By.XPATH, f"//button[normalize-space()='{name}']")
    return [one for one in found if one.is_displayed()]


def results(browser: Any) -> list[Any]:
    found = browser.find_elements(By.CSS_SELECTOR, "iframe[title=Results]")
    return [one for one in found if one.is_displayed()]


def opened(browser: Any, address: str, files: list[Path], tab: str = "") -> None:
    browser.get(address)
    soon(lambda: buttons(browser, "Label the images"), "the page")
    field = browser.find_element(By.CSS_SELECTOR, "input[type=file]")
    field.send_keys("\n".join(map(str, files)))
    soon(lambda: files[0].suffix in browser.find_element(By.TAG_NAME, "body").text, "the files")
    if tab:
        clicked(lambda: buttons(browser, tab)[0])


def typed(browser: Any, labels: str) -> None:
    field = browser.find_element(By.CSS_SELECTOR, "textarea[placeholder^='cat']")
    field.clear()
    field.send_keys(labels)


def shown_in_frame(browser: Any) -> Any:
    """Into the frame with the results, once its script has run."""
    frame = soon(lambda: results(browser), "results")[0]
    browser.execute_script("arguments[0].scrollIntoView()", frame)
    browser.switch_to.frame(frame)
    soon(lambda: browser.find_elements(By.CSS_SELECTOR, "#grid .card"), "cards")


@pytest.fixture(scope="module")
def dropped(tmp_path_factory, digit_photos) -> list[Path]:
    """Ten scanned digits, one of them of a name that would do harm."""
    folder = tmp_path_factory.mktemp("dropped")
    files = []
    for number, file in enumerate(sorted(digit_photos.glob("*/*.png"))[::3]):
        name = "<img src=x onerror=hacked=1>.png" if number == 3 else f"{file.parent.name}-{number}.png"
        with Image.open(file) as image:
            image.resize((48, 48)).save(folder / name)
        files.append(folder / name)
    return files


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    """A red square and a blue circle."""
    picture = Image.new("RGB", (96, 96), (90, 90, 90))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((10, 14, 46, 50), fill=(210, 40, 40))
    draw.ellipse((50, 46, 86, 82), fill=(40, 70, 210))
    file = tmp_path_factory.mktemp("scene") / "scene.png"
    picture.save(file)
    return file


def test_labels_in_the_app(browser, served, dropped):
    assert served.startswith("http://127.0.0.1:"), "on this machine alone"
    opened(browser, served, dropped)
    photographed(browser, "app")
    buttons(browser, "Label the images")[0].send_keys(Keys.ENTER)  # by the keyboard
    shown_in_frame(browser)
    assert count(browser) == "10 images"
    assert browser.execute_script("return typeof hacked") == "undefined"
    browser.switch_to.default_content()
    photographed(browser, "app-labels")
    assert browser.execute_script("return typeof hacked") == "undefined"
    assert "The same from a shell" in browser.find_element(By.TAG_NAME, "body").text
    assert not browser.find_elements(By.CSS_SELECTOR, "[src*='googleapis']"), "nothing comes from elsewhere"


@pytest.mark.parametrize(("tab", "button"), [("Tags", "Find tags"), ("Masks", "Make masks")])
def test_tags_and_masks_in_the_app(browser, served, scene, tab, button):
    opened(browser, served, [scene], tab)
    typed(browser, "red square, blue circle, green triangle, yellow star")
    soon(lambda: buttons(browser, button), "the tab")
    clicked(lambda: buttons(browser, button)[0])
    shown_in_frame(browser)
    assert count(browser) == "1 image"
    assert "red square" in browser.find_element(By.ID, "grid").text
    browser.switch_to.default_content()
    drawn = soon(lambda: browser.find_elements(By.CSS_SELECTOR, ".pictures img"), "pictures")[0]
    soon(lambda: browser.execute_script("return arguments[0].naturalWidth", drawn) > 300, "the picture itself")
    browser.execute_script("window.scrollTo(0, 0)")
    photographed(browser, f"app-{tab.lower()}")
    browser.execute_script("document.querySelector('iframe').scrollIntoView()")
    photographed(browser, f"app-{tab.lower()}-page")


def tab_of(browser: Any, name: str) -> Any:
    return next(one for one in browser.find_elements(By.CSS_SELECTOR, "[role=tab]") if one.text == name)


def test_the_app_fills_the_window(browser, served):
    """The same width in every tab, beside each other, and readable: WCAG's contrast of 4.5 on white."""
    scheme(browser, "light")
    browser.get(served)
    soon(lambda: buttons(browser, "Label the images"), "the page")
    widths = set()
    for tab in ("Labels", "Learn from a folder", "Tags", "Masks"):
        clicked(lambda tab=tab: tab_of(browser, tab))
        soon(lambda tab=tab: "selected" in tab_of(browser, tab).get_attribute("class"), tab)
        widths.add(browser.find_element(By.CSS_SELECTOR, ".gradio-container").size["width"])
        for selector in ("[role=tab].selected", ".info-text", ".gradio-container p"):
            for text in browser.find_elements(By.CSS_SELECTOR, selector):
                if text.is_displayed() and text.text:
                    assert 1.05 / (luminance(text.value_of_css_property("color")) + 0.05) >= 4.5, text.text
    assert widths == {browser.execute_script("return document.documentElement.clientWidth")}
    assert len(browser.find_elements(By.CSS_SELECTOR, ".waiting [data-testid=status-tracker]")) == 4, (
        "progress has a place"
    )


def test_where_the_keyboard_is_in_the_app(browser, served):
    """Fields and choices, too: Gradio's own ring around them is all but white, or absent."""
    browser.get(served)
    soon(lambda: buttons(browser, "Label the images"), "the page")
    seen = set()
    for _ in range(12):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        field = browser.switch_to.active_element
        if field.tag_name in ("input", "textarea", "button"):
            seen.add(field.get_attribute("type"))
            # Colours of buttons change by and by; 3 to 1 against white in the end.
            soon(lambda field=field: ring(field) < 0.3, field.get_attribute("outerHTML"))
    assert {"radio", "textarea"} <= seen


def ring(field: Any) -> float:
    """Luminance of the line around a field; white's where there is none."""
    style, colour = (field.value_of_css_property(f"outline-{name}") for name in ("style", "color"))
    return luminance(colour) if style == "solid" else 1.0


def test_a_port_that_is_taken(served):
    port = served.rstrip("/").rsplit(":", 1)[1]
    done = subprocess.run([sys.executable, "-m", "jaxzs", "app", "--port", port], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"--port {port} is taken: name another" in done.stderr


def test_errors_in_the_app(browser, served, dropped):
    opened(browser, served, dropped[:1])
    typed(browser, "<img src=x onerror=hacked=1>, giraffe")
    clicked(lambda: buttons(browser, "Label the images")[0])
    soon(lambda: "has never seen the words" in browser.find_element(By.TAG_NAME, "body").text, "the error")
    photographed(browser, "app-error")
    body = browser.find_element(By.TAG_NAME, "body").text
    assert "giraffe" in body
    assert "Traceback" not in body
    assert browser.execute_script("return typeof hacked") == "undefined"
