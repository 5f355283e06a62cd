"""The report's page in a browser: what a person sees, clicks and types, in headless Chromium."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from test_report import failed, make_report, rows_of, write_rows, write_scored_images

from csflow.errors import ExitStatus
from csflow.evaluation.job import EvaluateConfig, evaluate
from csflow.evaluation.labels import read_labels
from csflow.output.schemas import ERRORS
from csflow.storage import Location

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
    make_report(folder, top=30, link="https://viewer.example/?image={uri}")
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
    # Each has its photograph, and beside it the photograph again under its map.
    assert drawn.count() == 12
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
    assert page.locator("#page").input_value() == "2"
    assert page.locator("#pages").inner_text() == "of 3"
    page.locator("#find").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#page").input_value() == "2"


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
    uris = [text.partition(" · ")[2].strip() for text in addresses]
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


def test_verdicts_by_key_and_button_become_the_labels_that_evaluate_takes(
    page: "Page", report_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert page.locator("#labels").is_disabled()
    page.get_by_role("button", name="Enlarge 00.png").click()
    dialog = page.get_by_role("dialog")
    page.keyboard.press("d")
    # A verdict goes on to the next image.
    assert dialog.get_by_role("heading").inner_text() == "Image 2 of 30"
    page.keyboard.press("f")
    page.keyboard.press("d")
    page.keyboard.press("ArrowLeft")
    assert dialog.get_by_role("button", name="Defect").get_attribute("aria-pressed") == "true"
    page.keyboard.press("u")
    assert dialog.get_by_role("button", name="Defect").get_attribute("aria-pressed") == "false"
    page.keyboard.press("Escape")
    # The card whose picture has the focus, and buttons.
    page.keyboard.press("f")
    page.locator("#gallery > li:visible").nth(3).get_by_role("button", name="Defect").click()
    assert page.locator("#verdicts").inner_text() == (
        "4 of 30 images have a verdict: 2 defects, 2 false alarms"
    )
    # Heard, while the number of matches stays in sight.
    assert page.locator("#spoken").text_content() == "03.png: defect"
    assert page.locator("#status").inner_text() == "30 of 30 images match; 1 to 12 are shown"
    page.locator("#show").select_option("open")
    assert page.locator("#status").inner_text().startswith("26 of 30 images match")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download labels (CSV)").click()
    assert download.value.suggested_filename == "labels-m1.csv"
    labels = tmp_path / "labels.csv"
    download.value.save_as(labels)
    images = report_file.parent.parent / "images"
    given = {uri: label.is_defective for uri, label in read_labels(Location(str(labels))).items()}
    assert given == {
        str(images / "00.png"): True,
        str(images / "01.png"): False,
        str(images / "02.png"): False,
        str(images / "03.png"): True,
    }
    scores = str(report_file.parent.parent / "out")
    assert evaluate(EvaluateConfig(scores=scores, labels=str(labels))) == ExitStatus.DONE
    assert "2 normal, 2 defective" in capsys.readouterr().out


def test_verdicts_are_kept_until_the_page_is_opened_again(page: "Page") -> None:
    verdict = page.locator("#gallery > li:visible").first.get_by_role("button", name="False alarm")
    verdict.click()
    assert verdict.get_attribute("aria-pressed") == "true"
    for _ in range(10):  # Chromium keeps what a script stores a moment later
        page.reload()
        if verdict.get_attribute("aria-pressed") == "true":
            break
    else:
        pytest.fail("the verdict is lost")
    verdict.click()
    assert page.locator("#verdicts").inner_text().startswith("No verdicts yet")


def test_labels_hold_an_address_with_quotes_and_commas_as_it_is(browser: "Browser", tmp_path: Path) -> None:
    uri = '/d/a "b", c.png'
    write_rows(tmp_path / "out", [row | {"image_uri": uri} for row in rows_of(1, 0.025, 3.0)])
    make_report(tmp_path)
    page = browser.new_page()
    page.goto((tmp_path / "result" / "report.html").as_uri())
    page.get_by_role("button", name="Defect").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download labels (CSV)").click()
    download.value.save_as(tmp_path / "labels.csv")
    page.close()
    assert list(read_labels(Location(str(tmp_path / "labels.csv")))) == [uri]


def test_an_image_opens_elsewhere_by_its_link_and_its_address_is_copied(
    page: "Page", report_file: Path
) -> None:
    card = page.locator("#gallery > li:visible").nth(1)
    link = card.get_by_role("link")
    assert re.fullmatch(r"https://viewer\.example/\?image=%2F.*01\.png", link.get_attribute("href") or "")
    assert link.get_attribute("target") == "_blank"
    card.get_by_role("button", name="Copy address").click()
    page.locator("#find").focus()
    page.keyboard.press("Control+V")
    assert page.locator("#find").input_value() == str(report_file.parent.parent / "images" / "01.png")


def test_one_jumps_to_a_page(page: "Page") -> None:
    page.locator("#page").fill("3")
    page.keyboard.press("Enter")
    assert shown(page) == list(range(25, 31))
    page.locator("#page").fill("99")
    page.keyboard.press("Enter")
    assert page.locator("#page").input_value() == "3"


def test_the_slider_sets_how_much_of_the_map_is_seen(page: "Page") -> None:
    def opacity() -> str:
        layer = page.locator("#gallery > li:visible img.layer").first
        return str(layer.evaluate("layer => getComputedStyle(layer).opacity"))

    assert opacity() == "0.8"
    page.get_by_label("Map", exact=True).first.fill("25")
    assert opacity() == "0.25"
    page.get_by_role("button", name="Enlarge 00.png").click()
    assert page.locator("#viewer-opacity").input_value() == "25"
    # The keys of verdicts work from the slider, too; its own arrow keys stay its own.
    page.locator("#viewer-opacity").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#opacity").input_value() == "30"
    assert page.get_by_role("dialog").get_by_role("heading").inner_text() == "Image 1 of 30"


def test_a_bar_a_day_a_folder_or_a_place_chooses_its_images(page: "Page") -> None:
    def matching() -> str:
        return page.locator("#status").inner_text().partition(";")[0]

    page.get_by_role("button", name=re.compile("^score 4.* show 1 image")).last.click()
    assert shown(page) == [1]
    page.get_by_role("button", name=re.compile("Take the filter away: score")).click()
    assert matching() == "30 of 30 images match"
    page.get_by_role("button", name=re.compile("^day 2026-09-28: show 4 images")).focus()
    page.keyboard.press("Enter")
    assert shown(page) == [1, 2, 3, 4]
    page.get_by_role("button", name=re.compile("^folder d: show 26 images")).click()
    assert matching().startswith("No image matches")
    page.get_by_role("button", name=re.compile("Take the filter away: day")).click()
    assert matching() == "26 of 30 images match"
    page.get_by_role("button", name=re.compile("Take the filter away: folder")).click()
    # All flagged images are hot in one cell, and so is the image that has the hottest cell of the others.
    page.locator("#cells").focus()
    page.keyboard.press("Enter")
    assert page.locator("#chosen").inner_text() == "hot in row 2, column 2 ✕"
    assert page.locator("#cell").inner_text() == (
        "Row 2, column 2: hot in 15 of 15 flagged images, 16 on this page"
    )
    assert matching() == "16 of 30 images match"


def test_the_counts_of_a_choice_are_those_of_the_summary(page: "Page") -> None:
    page.get_by_role("link", name="See all below").first.click()
    assert page.locator("#show").input_value() == "flagged"
    assert page.locator("#status").inner_text().startswith("15 of 30 images match")
    assert page.locator("#beyond").inner_text() == ""


def test_the_page_says_what_a_choice_has_beyond_it(browser: "Browser", tmp_path: Path) -> None:
    write_rows(tmp_path / "out", rows_of(20, 0.01, 5.0) + rows_of(80, 0.6, 1.0))
    make_report(tmp_path, top=8)
    page = browser.new_page()
    page.goto((tmp_path / "result" / "report.html").as_uri())
    page.locator("a[data-show=listed]").click()
    assert page.locator("#status").inner_text().startswith("8 of 8 images match")
    assert page.locator("#beyond").inner_text().startswith("12 more images are on the defect list")
    page.close()


@pytest.mark.parametrize("width", [390, 800])
def test_wide_tables_scroll_in_themselves(page: "Page", width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for name in ("Table of folders, can be scrolled", "Table of errors, can be scrolled"):
        table = page.get_by_role("group", name=name)
        cut = """box => [...box.querySelectorAll("td, th")].some(cell =>
            cell.getBoundingClientRect().right > box.getBoundingClientRect().left + box.scrollWidth + 1)"""
        assert not table.evaluate(cut)
        table.evaluate("box => box.scrollTo(10000, 0)")
        last = table.locator("th").last.bounding_box()
        assert last is not None
        assert last["x"] + last["width"] <= width


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
