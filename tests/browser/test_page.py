"""The page in a real browser: it loads nothing, fits a phone and a desk, and obeys no text that a model wrote."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evolve_ray.report import runs
from tests.plain.runs import HOSTILE, chains, make_run

TALK = "I have improved the answer. 42"


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    """A run's page and the comparison of two runs; prompts and answers are hostile, one of them is long."""
    words = [*HOSTILE, "a question", "word " * 2000, "x" * 3000]
    right = [[0, 1], [1, 0], [0, 0], [0, 1], [1, 0], [0, 1], [1, 1], [0, 0]]
    held = chains(right, tag=HOSTILE[0], texts=words)
    held["a question"][1] = (TALK, 1.0, 1.0)
    names = ("base", "activation", "iteration 1", "iteration 2", "iteration 3")
    root = tmp_path_factory.mktemp("page")
    answers = {name: {"held": held, "a-split-with-a-long-name": held} for name in names}
    for folder in ("one", "other"):
        make_run(root / folder, answers, config={"prompts": {"path": HOSTILE[1]}, "a": {"long": "option " * 60}})
    assert runs.main([str(root / "one"), str(root / "other"), "--html", str(root / "comparison.html")]) == 0
    return {"run": root / "one" / "report.html", "comparison": root / "comparison.html"}


class Visit:
    """A page, opened at a width in a colour scheme, with everything that it tried to do."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str = "light"):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.goto(path.as_uri())
        self.width = width

    def boxes(self, selector: str) -> list[dict[str, float]]:
        return self.page.eval_on_selector_all(selector, "found => found.map(one => one.getBoundingClientRect().toJSON())")


@pytest.fixture(params=[("run", 360), ("run", 1280), ("comparison", 360), ("comparison", 1280)], ids=str)
def visit(request, browser, paths) -> Iterator[Visit]:
    name, width = request.param
    found = Visit(browser, paths[name], width)
    yield found
    found.page.close()


@pytest.fixture
def run_page(browser, paths) -> Iterator[Any]:
    found = Visit(browser, paths["run"], 1280)
    yield found.page
    assert found.said == []
    found.page.close()


def test_nothing_is_asked_of_the_network_and_nothing_is_complained_about(visit):
    visit.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    visit.page.wait_for_timeout(200)
    assert [url for url in visit.asked if not url.endswith(".html")] == []
    assert len(visit.asked) == 1
    assert visit.said == []


@pytest.mark.parametrize("opened", [False, True], ids=["folded", "unfolded"])
def test_the_page_is_as_wide_as_the_window(visit, opened):
    visit.page.evaluate("opened => document.querySelectorAll('details').forEach(one => one.open = opened)", opened)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == visit.width
    inside = "section > *, figure, .card, .chain, pre, .wide, dd"
    assert [box for box in visit.boxes(inside) if box["right"] > visit.width or box["left"] < 0] == []


def test_every_figure_can_be_seen(visit):
    boxes = visit.boxes("figure > svg")
    assert len(boxes) >= 8
    for box in boxes:
        assert box["width"] >= 250
        assert box["height"] >= 60
        assert box["left"] >= 0
        assert box["right"] <= visit.width


def test_text_of_a_figure_is_large_enough_and_inside_of_it(visit):
    sizes = visit.page.eval_on_selector_all(
        "figure > svg text",
        """found => found.map(one => {
            const drawn = one.getScreenCTM();  // a rotated text is as large as its axes are long
            return parseFloat(getComputedStyle(one).fontSize) * Math.hypot(drawn.a, drawn.b);
        })""",
    )
    assert min(sizes) >= 9.0
    outside = visit.page.evaluate(
        """() => [...document.querySelectorAll('figure > svg')].flatMap(svg => {
            const box = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(text => {
                const own = text.getBoundingClientRect();
                return own.left < box.left - 2 || own.right > box.right + 2 || own.top < box.top - 2
                    || own.bottom > box.bottom + 2;
            }).map(text => text.textContent);
        })"""
    )
    assert outside == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page_and_figures_follow_it(browser, paths, scheme):
    """The colours that the browser computes, not those that were asked for."""
    visit = Visit(browser, paths["run"], 1280, scheme)
    told = visit.page.evaluate(
        """() => ({page: getComputedStyle(document.body).backgroundColor, text: getComputedStyle(document.body).color,
                   tick: getComputedStyle(document.querySelector('figure > svg text')).fill})"""
    )
    visit.page.close()
    difference = brightness(told["page"]) - brightness(told["text"])
    assert difference > 180 if scheme == "light" else difference < -180
    assert told["tick"] == told["text"]


def brightness(color: str) -> float:
    return sum(int(part) for part in color.removeprefix("rgb(").rstrip(")").split(", ")) / 3


def test_text_of_a_figure_can_be_selected(run_page):
    selected = run_page.evaluate(
        """() => {
            const text = [...document.querySelectorAll('figure > svg text')].find(one => one.textContent === 'activation');
            getSelection().selectAllChildren(text);
            return getSelection().toString();
        }"""
    )
    assert selected == "activation"


def test_hostile_text_makes_no_element_and_runs_nothing(visit):
    page = visit.page
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert page.locator("script, img, iframe, object, embed, form, math, circle, base, link").count() == 0
    assert page.evaluate("[...document.querySelectorAll('a')].every(one => one.getAttribute('href').startsWith('#'))")
    assert page.evaluate("getComputedStyle(document.body).display") == "block"
    assert visit.said == []


def test_hostile_text_is_shown_as_it_was_written(run_page):
    shown = run_page.eval_on_selector_all(".chain pre", "found => found.map(one => one.textContent)")
    for text in HOSTILE[:4]:
        assert text in shown


def test_policy_stops_a_script_even_if_one_got_in(browser, paths, tmp_path):
    text = paths["run"].read_text(encoding="utf-8")
    text = text.replace("</body>", "<script>window.hacked = 1</script><p style='color:red' id=p></p></body>")
    path = tmp_path / "broken.html"
    path.write_text(text, encoding="utf-8")
    visit = Visit(browser, path, 1280)
    assert visit.page.evaluate("window.hacked") is None
    assert visit.page.evaluate("getComputedStyle(document.getElementById('p')).color") != "rgb(255, 0, 0)"
    assert any("Content Security Policy" in said for said in visit.said)
    visit.page.close()


def test_a_chain_opens_to_its_prompt_and_rounds(run_page):
    chain = run_page.locator(".chain", has_text="a question").first
    assert not chain.get_by_text(TALK).is_visible()
    chain.locator("summary").click()
    assert chain.get_by_text(TALK).is_visible()
    assert chain.get_by_text("the answer", exact=True).is_visible()
    assert chain.get_by_text("y2: score 1.000, right").is_visible()


def test_chains_are_chosen_by_kind_and_by_model(run_page):
    def visible() -> list[str]:
        return [one.get_attribute("class") for one in run_page.locator(".chain").all() if one.is_visible()]

    every = visible()
    assert len(every) > 10
    run_page.get_by_label("talks about the change").check()
    assert visible() == [kinds for kinds in every if "talk" in kinds.split()] != []
    run_page.get_by_label("iteration 3", exact=True).check()
    assert visible() == [kinds for kinds in every if {"talk", "m1"} <= set(kinds.split())] != []
    run_page.locator("#kind-all").check()
    run_page.locator("#model-all").check()
    assert visible() == every


def test_wide_tables_scroll_in_their_own_box(browser, paths):
    visit = Visit(browser, paths["run"], 360)
    visit.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    moved = visit.page.eval_on_selector_all(
        ".wide",
        """found => found.filter(one => one.scrollWidth > one.clientWidth)
                      .map(one => { one.scrollLeft = 40; return one.scrollLeft; })""",
    )
    assert len(moved) > 5
    assert min(moved) > 0
    visit.page.close()


def test_numbers_of_a_figure_unfold_below_it(run_page):
    figure = run_page.locator("#gain figure").first
    assert not figure.locator("table").is_visible()
    figure.locator("summary").click()
    assert figure.locator("table").is_visible()
    assert "y2 - y1" in figure.locator("thead").inner_text()


def test_links_lead_to_sections(run_page):
    for link in run_page.locator("nav a").all():
        assert run_page.locator(link.get_attribute("href")).count() == 1
