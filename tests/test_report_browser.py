"""The report's page in a browser: what a person sees, clicks and types, in headless Chromium."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from test_report import failed, make_report, rows_of, write_rows, write_scored_images

from csflow.output.schemas import ERRORS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")

CONTRAST = """
() => {
  const channel = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const rgba = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => channel(v / 255)).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] !== 0) return c; } return [255, 255, 255]; };
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest(":disabled, .unseen, script, title")) continue;
    const style = getComputedStyle(e);
    const text = light(rgba(e.closest("svg") ? style.fill : style.color)), back = light(behind(e));
    const ratio = (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
    if (ratio < 4.5) low.push(`${e.tagName} ${e.className} ${e.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return low;
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with playwright.sync_playwright() as started:
        # Playwright gives each browser a new profile.
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images on two days: the first 15 are flagged, and 26 cannot be read any more; errors, folders."""
    folder = tmp_path_factory.mktemp("browser")
    uris = write_scored_images(folder, [5.0, 4.0, 3.9, 3.8])
    assert len(uris) == 4
    hot = rows_of(11, 0.025, 3.0)
    calm = rows_of(15, 0.5, 1.0)
    write_rows(folder / "out", [row | {"is_anomalous": False} for row in calm] + hot, night=1)
    write_rows(folder / "out", [failed("/d/broken.png", "truncated")], ERRORS)
    make_report(folder, top=30)
    return folder / "result" / "report.html"


@pytest.fixture
def page(browser: "Browser", report_file: Path) -> Iterator["Page"]:
    """The report, light, in a wide window. What it complains about fails the test."""
    complaints: list[str] = []
    opened = browser.new_page(viewport={"width": 1400, "height": 1000}, color_scheme="light")
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: _only_the_page(request.url, complaints))
    opened.goto(report_file.as_uri())
    yield opened
    opened.close()
    assert complaints == []


def _only_the_page(url: str, complaints: list[str]) -> None:
    if not url.startswith(("file:", "data:")):
        complaints.append(f"asked for {url}")


def shown(page: "Page") -> list[int]:
    """Ranks of the images that can be seen, in their order."""
    cards = page.locator("#gallery > li:visible")
    return [int(rank) for rank in cards.evaluate_all("cards => cards.map(card => card.dataset.rank)")]


def test_the_page_shows_its_sections_and_the_first_images(page: "Page") -> None:
    assert page.locator("h2:visible").all_text_contents() == [
        "Anomaly scores",
        "Where anomalies occur",
        "Time line, by day",
        "Folders",
        "30 most anomalous images",
        "Images that could not be scored",
    ]
    assert shown(page) == list(range(1, 13))
    drawn = page.locator("#gallery > li:visible img")
    assert drawn.count() == 8
    assert all(drawn.evaluate_all("images => images.map(image => image.naturalWidth > 0)"))
    assert page.locator("#status").inner_text() == "30 of 30 images match; 1 to 12 are shown"


def test_arrow_keys_turn_the_pages_but_not_while_one_types(page: "Page") -> None:
    page.keyboard.press("ArrowRight")
    assert shown(page) == list(range(13, 25))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert shown(page) == list(range(25, 31))
    assert page.locator("#next").is_disabled()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#page").inner_text() == "Page 2 of 3"
    page.locator("#find").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#page").inner_text() == "Page 2 of 3"


def test_a_search_and_a_choice_filter_the_images_and_say_how_many_match(page: "Page") -> None:
    page.locator("#next").click()
    page.locator("#find").fill("1.0-0")
    assert page.locator("#status").inner_text() == "15 of 30 images match; 1 to 12 are shown"
    page.locator("#find").fill("")
    page.locator("#show").select_option("unflagged")
    assert len(shown(page)) == 12
    assert set(shown(page)) <= set(range(16, 31))
    page.locator("#find").fill("no such image")
    assert shown(page) == []
    assert "No image matches" in page.locator("#status").inner_text()
    assert page.locator("#status").get_attribute("aria-live") == "polite"


def test_images_are_put_in_another_order(page: "Page") -> None:
    page.locator("#order").select_option("address")
    addresses = page.locator("#gallery > li:visible .uri").all_text_contents()
    uris = [text.partition(" · ")[2] for text in addresses]
    assert uris == sorted(uris)
    page.locator("#order").select_option("score")
    assert shown(page) == list(range(1, 13))


def test_an_image_is_enlarged_and_the_keyboard_goes_on_from_there(page: "Page") -> None:
    page.get_by_role("button", name="Enlarge 01.png").click()
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("heading").inner_text() == "Image 2 of 30"
    page.keyboard.press("ArrowRight")
    assert dialog.get_by_role("heading").inner_text() == "Image 3 of 30"
    assert "02.png" in dialog.locator(".uri").inner_text()
    in_page = page.locator("#gallery > li:visible img").first.bounding_box()
    enlarged = dialog.locator("img").first.bounding_box()
    assert in_page is not None
    assert enlarged is not None
    assert enlarged["width"] > 2 * in_page["width"]
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Enlarge 02.png"


def test_light_and_dark_follow_the_system_until_one_is_chosen(page: "Page") -> None:
    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = background()
    page.emulate_media(color_scheme="dark")
    dark = background()
    assert dark != light
    page.get_by_role("button", name="Light theme").click()
    assert background() == light
    page.reload()
    assert background() == light
    page.get_by_role("button", name="Dark theme").click()
    page.emulate_media(color_scheme="light")
    assert background() == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(page: "Page", scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    assert page.evaluate(CONTRAST) == []


def test_a_narrow_window_needs_no_scrolling_to_the_side(page: "Page") -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_on_paper_there_are_all_images_that_match_and_no_controls(page: "Page") -> None:
    page.locator("#show").select_option("flagged")
    page.emulate_media(media="print", color_scheme="dark")
    assert shown(page) == list(range(1, 16))
    assert not page.locator("#find").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_everything_that_is_drawn_has_a_name_for_screen_readers(page: "Page") -> None:
    nameless = (
        """elements => elements.filter(e => !(e.alt || e.ariaLabel)).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert page.locator("img, svg, [role=img]").evaluate_all(nameless) == []
    for name in ("Search in addresses", "Show", "Order"):
        assert page.get_by_label(name, exact=True).count() == 1
    assert [page.locator(landmark).count() for landmark in ("header", "main", "footer")] == [1, 1, 1]


def test_without_its_script_the_page_shows_every_image(browser: "Browser", report_file: Path) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(report_file.as_uri())
        assert page.locator("#gallery > li:visible").count() == 30
        assert not page.locator("#find").is_visible()


def test_the_address_of_an_image_can_do_nothing_to_the_page(browser: "Browser", tmp_path: Path) -> None:
    hostile = (
        "/d/<img src=x onerror=\"document.title='taken'\">'\"><script>document.title='taken'</script>.png"
    )
    write_rows(tmp_path / "out", [row | {"image_uri": hostile} for row in rows_of(1, 0.025, 3.0)])
    make_report(tmp_path)
    page = browser.new_page()
    page.goto((tmp_path / "result" / "report.html").as_uri())
    assert page.title() == "Anomaly report · model m1"
    assert hostile in page.locator("#gallery .uri").inner_text()
    page.close()
