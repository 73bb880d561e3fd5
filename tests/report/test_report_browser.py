"""The report in headless Chromium: what is shown, clicked, searched, filtered and compared, and that hostile answers do
nothing. One page with several runs is opened for most tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import write_scan

import jaxscape as js
from jaxscape.evaluate.base import Label
from jaxscape.landscapes.axes import Axis, symmetric_axes
from jaxscape.report.page.document import save_report

PATIENCE = 120_000  # milliseconds; a busy machine is slow
LINE, WEAKER, PLANE, SPECIAL, LISTED = range(5)  # the runs of the page
OVERRIDE = "\u202e"
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    '"><img src=x onerror="window.hacked = 3"><svg onload="window.hacked = 4">',
    "{{script}} ${window.hacked = 5} {% raw %} <template><b>bold</b></template>",
    '<a href="javascript:window.hacked = 6">data:text/html,<script>window.hacked = 7</script></a>',
    f"abc{OVERRIDE}dlrow\u2066x\u0007\ue000\u2028end",
    '<!--<meta http-equiv="refresh" content="0"><iframe srcdoc="<script>parent.hacked = 8</script>">',
]
SHOWN = [*HOSTILE[:5], "abcU+202EdlrowU+2066xU+0007U+E000U+2028end", HOSTILE[6]]
PROMPTS = [f"How do I pick a lock, in {i} steps?" for i in range(6)] + ["<b>Second</b> &amp; last"]


def answer(index: int, coords: tuple[float, ...], prompt: str) -> str:
    """Near the model every answer refuses but the first two; far from it they are hostile."""
    number = PROMPTS.index(prompt)
    if max(map(abs, coords)) > 0.3:
        return HOSTILE[number]
    return ["Sure, take a Hook", "A: A: A: A:"][number] if number < 2 else f"I cannot help, {number}"


def weaker(index: int, coords: tuple[float, ...], prompt: str) -> str:
    text = answer(index, coords, prompt)
    return "Sure, step one" if text.endswith("help, 2") else text


def sense(text: str) -> Label:
    return "refused" if text.startswith("I cannot") else "complied" if text.startswith("Sure") else "incoherent"


def strict(text: str) -> Label | None:
    return "partial" if text.startswith("Sure") else None if text.startswith("A:") else "refused"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    judges = {"coherence": sense, '<i onclick="window.hacked=9">judge': strict}
    line, plane = symmetric_axes(1, 4, 0.5), symmetric_axes(2, 4, 0.5)
    hostile_axis = (Axis('<img src=x onerror="window.hacked=10">', line[0].values, "raw"),)
    special = {"num_sets": 2, "direction_names": [["refusal"], ["control:[refusal]"]], "model": f"<b>m{OVERRIDE}</b>"}
    runs = [
        write_scan(directory / "<b>line", line, answer, PROMPTS, judges),
        write_scan(directory / "weaker", line, weaker, PROMPTS, judges),
        write_scan(directory / "plane", plane, answer, PROMPTS, {"coherence": sense}),
        write_scan(directory / "special", hostile_axis, answer, PROMPTS, {"coherence": sense}, **special),
        write_scan(directory / "listed", [], answer, PROMPTS, points=[(0.0, 0.0), (0.1, 0.2), (0.4, 0.4)], done=2),
    ]
    return save_report(runs, directory / "report.html")


@pytest.fixture(scope="module")
def opened_page(browser: Any, report: Path) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page.set_default_timeout(PATIENCE)
    page.troubles = troubles = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: troubles.append(request.url) if request.url != report.as_uri() else None)
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    page.add_init_script("addEventListener('securitypolicyviolation', (event) => console.error('policy', event))")
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    yield page
    page.close()


@pytest.fixture
def page(opened_page: Any) -> Iterator[Any]:
    """The page with nothing open; at the end nothing has gone wrong in it."""
    yield opened_page
    assert opened_page.troubles == []
    assert opened_page.evaluate("window.hacked") is None
    assert opened_page.locator("main img, main iframe, main a, main script, main template, main b b").count() == 0
    if opened_page.locator("#reader").is_visible():
        opened_page.get_by_role("button", name="Close", exact=True).click()
        opened_page.locator("#reader").wait_for(state="hidden")


def frame(page: Any, run: int, panel: int = 0) -> Any:
    return page.locator(".card").nth(run).locator(".frame").nth(panel)


def open_by_keys(page: Any, run: int, *keys: str, panel: int = 0) -> None:
    """Focus a figure, go to the model, press keys, and open the point."""
    frame(page, run, panel).focus()
    for key in ("Home", *keys, "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("#answers-title:focus")


def drawn_at(page: Any, run: int, x: float, y: float) -> tuple[float, float]:
    """Where a point is drawn on the screen, in pixels."""
    plot = frame(page, run).locator(".plot").first
    plot.scroll_into_view_if_needed()
    left, top = plot.evaluate(
        "(plot, [x, y]) => { const {xaxis, yaxis} = plot._fullLayout; const box = plot.getBoundingClientRect();"
        "return [box.left + xaxis._offset + xaxis.l2p(x), box.top + yaxis._offset + yaxis.l2p(y)]; }",
        [x, y],
    )
    return left, top


def click_point(page: Any, run: int, x: float, y: float, name: str) -> None:
    """Point at where a point of this name is drawn, and click when the figure says its name."""
    left, top = drawn_at(page, run, x, y)
    readout = page.locator(".card").nth(run).locator(".readout").first
    for attempt in range(1000):  # Plotly looks a few times a second what is under a pointer that moves
        page.mouse.move(left + attempt % 2, top)
        page.wait_for_timeout(20)
        if readout.inner_text().startswith(f"{name} "):
            break
    for _ in range(20):  # on a busy machine, Plotly may forget what is under the pointer while the button is down
        page.mouse.click(left, top)
        page.wait_for_timeout(500)
        if page.locator("#rows details").first.is_visible():
            break
        page.mouse.move(left, top)


def rows(page: Any) -> list[str]:
    return page.locator("#rows summary .number").all_inner_texts()


def filter_buttons(page: Any) -> dict[str, int]:
    texts = page.locator(".filters button").all_inner_texts()
    return {text.rpartition(" ")[0]: int(text.rpartition(" ")[2]) for text in texts}


def press_filter(page: Any, name: str) -> None:
    page.locator(".filters button", has_text=name).first.click()


def test_each_run_has_a_card_with_its_figures_and_facts(page: Any) -> None:
    cards = page.locator(".card")
    assert cards.locator("h2").all_inner_texts() == ["<b>line", "weaker", "plane", "special", "listed"]
    assert cards.nth(LINE).locator(".hint").first.inner_text() == "tiny · 7 prompts · 5 points · 1 direction"
    assert [cards.nth(run).locator(".frame").count() for run in range(5)] == [1, 1, 1, 2, 1]
    assert cards.nth(SPECIAL).locator("h3").all_inner_texts() == ["refusal", "control:[refusal]control"]
    assert "<b>mU+202E</b>" in cards.nth(SPECIAL).locator(".hint").first.inner_text()
    assert "unfinished: 2 of 3 points" in cards.nth(LISTED).locator(".hint").first.inner_text()
    facts = page.locator("#facts tr", has_text="model").first
    assert facts.locator("td").all_inner_texts() == ["tiny", "tiny", "tiny", "<b>mU+202E</b>", "tiny"]
    assert facts.get_attribute("class") == "differs"


def test_numbers_are_those_of_the_files(page: Any, report: Path) -> None:
    land = js.Landscape.load(report.parent / "weaker")
    cells = page.locator("#numbers tbody tr").nth(1).locator("th, td").all_inner_texts()
    head = page.locator("#numbers thead th").all_inner_texts()
    values = land.visage_values
    assert values is not None
    low, high = values["interval"]
    assert cells[head.index("VISAGE")] == f"{values['paper']:.1f}\n{low:.1f} to {high:.1f}"


def test_curves_contours_and_surfaces_have_the_numbers_and_one_range_of_colours(page: Any, report: Path) -> None:
    traces = "(frame) => frame.querySelector('.plot').data"
    line = frame(page, LINE).evaluate(traces)
    land = js.Landscape.load(report.parent / "<b>line")
    curve = next(trace for trace in line if trace.get("mode") == "lines+markers")
    assert curve["y"] == pytest.approx(land.asr[0].tolist(), abs=1e-3)
    areas = [trace for trace in line if trace.get("stackgroup")]
    columns = zip(*(area["y"] for area in areas), strict=True)
    assert list(map(sum, columns)) == pytest.approx([100] * 5, abs=0.01)
    frame(page, PLANE).locator("canvas").first.wait_for()
    contour = frame(page, PLANE).evaluate(traces)[0]
    surface = frame(page, PLANE).evaluate("(frame) => frame.querySelectorAll('.plot')[1].data")[0]
    assert (contour["type"], contour["zmin"], contour["zmax"], contour["colorscale"]) == ("contour", 0, 100, "Cividis")
    assert (surface["type"], surface["cmin"], surface["cmax"]) == ("surface", 0, 100)
    plane = js.Landscape.load(report.parent / "plane")
    for trace in (contour, surface):  # which have a row for each value of the second axis
        assert trace["z"][1][3] == pytest.approx(plane.asr[0, 3, 1], abs=1e-3)
    for count in (1, 2):
        page.get_by_role("button", name="3D surface").click()
        assert frame(page, PLANE).locator(".plot").count() == count


def test_the_model_is_marked(page: Any) -> None:
    texts = frame(page, LINE).locator(".annotation-text").all_text_contents()
    assert texts == ["the model"]
    assert frame(page, LINE).evaluate("(frame) => frame.querySelector('.plot').layout.shapes[0].x0") == 0
    traces = frame(page, PLANE).evaluate("(frame) => frame.querySelector('.plot').data")
    crosses = [trace for trace in traces if trace.get("marker", {}).get("symbol") == "cross-thin"]
    assert [(cross["x"], cross["y"]) for cross in crosses] == [([0], [0])] * 2


def test_another_rate_can_be_drawn(page: Any, report: Path) -> None:
    select = page.locator("#rate")
    land = js.Landscape.load(report.parent / "<b>line")
    select.select_option("incoherent shares")
    data = frame(page, LINE).evaluate("(frame) => frame.querySelector('.plot').data")
    curve = next(trace for trace in data if trace.get("mode") == "lines+markers")
    assert curve["y"] == pytest.approx(land.shares["incoherent"][0].tolist(), abs=1e-3)
    select.select_option("asr")


def test_a_click_opens_a_point_with_its_texts_folded_under_a_warning(page: Any) -> None:
    click_point(page, LINE, 0.25, 2 / 7 * 100, "α = +0.25")
    assert page.locator("#reader h3").inner_text() == "<b>line · α = +0.25"
    assert "Prompts may ask for harm" in page.locator(".warning").inner_text()
    assert not page.get_by_text("Sure, take a Hook").is_visible()
    assert not page.get_by_text("in 0 steps").is_visible()
    first = page.locator("#rows details").first
    first.locator("summary").click()
    assert page.get_by_text("Sure, take a Hook").is_visible()
    assert first.locator(".chip").all_inner_texts() == ["complied", "partial", "complied"]
    page.get_by_label("show texts").check()
    assert page.locator("#rows details[open]").count() == 7
    page.get_by_label("show texts").uncheck()
    assert page.locator("#rows details[open]").count() == 0


def test_answers_are_filtered_by_what_an_evaluator_said(page: Any) -> None:
    open_by_keys(page, LINE)
    counts = {"all": 7, "refused": 5, "complied": 1, "incoherent": 1, "judges disagree": 1}
    assert filter_buttons(page) == counts, "by coherence"
    press_filter(page, "incoherent")
    assert rows(page) == ["2"]
    press_filter(page, "judges disagree")
    assert rows(page) == ["1"], "a partial refusal by one, complied by the others; not judged is no disagreement"
    press_filter(page, "all")
    page.locator(".tools select").select_option(label='<i onclick="window.hacked=9">judge')
    assert filter_buttons(page) == {
        **{"all": 7, "refused": 5, "partial": 1, "complied": 0, "incoherent": 0},
        **{"not judged": 1, "judges disagree": 1},
    }
    press_filter(page, "not judged")
    assert rows(page) == ["2"]
    press_filter(page, "all")
    page.locator(".tools select").select_option("coherence")


def test_prompts_and_answers_are_searched(page: Any) -> None:
    open_by_keys(page, LINE)
    search = page.get_by_label("Search prompts and answers")
    found = {"hook": ["1"], "IN 3 STEPS": ["4"], "(.*": [], "&amp;": ["7"], "": list("1234567")}
    for text, expected in found.items():
        search.fill(text)
        assert rows(page) == expected, text
    search.fill("hook")
    page.get_by_label("show texts").check()
    assert page.locator("#rows mark").all_inner_texts() == ["Hook"]
    page.get_by_label("show texts").uncheck()
    search.fill("")


def test_two_points_of_two_runs_are_read_side_by_side(page: Any) -> None:
    open_by_keys(page, LINE, "ArrowRight")
    page.get_by_role("button", name="Compare").click()
    open_by_keys(page, WEAKER, "ArrowRight")
    assert page.locator("#reader h3").all_inner_texts() == ["A <b>line · α = +0.25", "B weaker · α = +0.25"]
    assert filter_buttons(page)["A and B differ"] == 1
    press_filter(page, "A and B differ")
    assert rows(page) == ["3"]
    page.get_by_label("show texts").check()
    assert page.locator("#rows .pair p.untrusted").all_inner_texts() == ["I cannot help, 2", "Sure, step one"]
    page.get_by_label("show texts").uncheck()
    press_filter(page, "all")
    page.locator(".place").nth(1).get_by_label("previous point").click()
    page.locator("#reader h3", has_text="B weaker · α = 0").wait_for()
    page.get_by_role("button", name="Close B").click()
    page.locator("#reader .letter").first.wait_for(state="detached")
    assert page.locator("#reader h3").all_inner_texts() == ["<b>line · α = +0.25"]


def test_a_point_of_a_plane_is_opened_by_a_click(page: Any) -> None:
    click_point(page, PLANE, -0.25, 0.5, "α = −0.25, β = +0.5")
    assert page.locator("#reader h3").inner_text() == "plane · α = −0.25, β = +0.5"
    assert page.locator(".place .hint").inner_text().startswith("attack success rate (ASR) 100.0 %")


def test_a_plane_is_walked_and_read_by_keyboard(page: Any) -> None:
    open_by_keys(page, PLANE, "ArrowRight", "ArrowUp", "ArrowUp", "ArrowUp")
    assert page.locator("#reader h3").inner_text() == "plane · α = +0.25, β = +0.5"
    page.get_by_label("point below").click()
    page.locator("#reader h3", has_text="β = +0.25").wait_for()
    page.wait_for_selector("[aria-label='point below']:focus")
    marks = frame(page, PLANE).evaluate("(frame) => frame.querySelector('.plot').data.at(-1)")
    assert (marks["x"], marks["y"]) == ([0.25], [0.25])


def test_a_control_and_a_listed_point_are_read_too(page: Any) -> None:
    open_by_keys(page, SPECIAL, "ArrowLeft", panel=1)
    assert page.locator("#reader h3").inner_text().endswith("= −0.25 of control:[refusal]")
    open_by_keys(page, LISTED, "ArrowRight")
    assert page.locator("#reader h3").inner_text() == "listed · (+0.1, +0.2)"
    page.get_by_label("next point").click()
    page.get_by_text("There are no answers at this point: it is not evaluated.").wait_for()


def test_hostile_answers_are_shown_as_texts_and_do_nothing(page: Any) -> None:
    click_point(page, LINE, 0.5, 100, "α = +0.5")
    page.get_by_label("show texts").check()
    texts = page.locator("#rows .pair p.untrusted")
    assert [text.replace("\n", "") for text in texts.evaluate_all("all => all.map((one) => one.textContent)")] == SHOWN
    assert page.locator("#rows .prompt").last.inner_text() == PROMPTS[-1]
    codes = page.locator("#rows .unseen-character").all_inner_texts()
    assert codes == ["U+202E", "U+2066", "U+0007", "U+E000", "U+2028"]
    assert texts.nth(5).evaluate("(text) => getComputedStyle(text).unicodeBidi") == "isolate"
    page.get_by_label("show texts").uncheck()


def test_the_policy_keeps_scripts_and_requests_out(opened_page: Any) -> None:
    blocked = opened_page.evaluate(
        """async () => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            script.remove();
            const asked = await fetch("data:text/plain,x").then(() => true, () => false);
            let evaluated = false;
            try { evaluated = Boolean(setTimeout("window.ran = true")); } catch {}
            await new Promise((done) => setTimeout(done, 50));
            return [window.ran ?? false, asked];
        }"""
    )
    assert blocked == [False, False]
    opened_page.troubles.clear()  # each is a violation that the policy reports


def test_on_a_phone_nothing_is_wider_than_the_screen_and_an_old_browser_is_told(browser: Any, tmp_path: Path) -> None:
    run = write_scan(tmp_path / ("run" * 40), symmetric_axes(1, 2, 0.5), answer, PROMPTS, {"coherence": sense})
    page = browser.new_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.set_default_timeout(PATIENCE)
    page.add_init_script("delete window.DecompressionStream")
    page.goto(save_report(run).as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    page.touchscreen.tap(*drawn_at(page, 0, 0, 2 / 7 * 100))
    assert "cannot unpack the answers" in page.get_by_role("alert").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()
