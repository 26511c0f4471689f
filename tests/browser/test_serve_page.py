"""The page of the endpoint in a real browser, against a real Serve whose engine has no model."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.plain.conftest import tiny_model
from tests.plain.runs import HOSTILE
from tests.wiring.serve.conftest import KEYS, serving

__all__ = ["tiny_model"]
WIDTHS = (360, 1280)
SCORING = ("scorer.name=verifier", "verifier.name=evolve_ray.toy.task:SortVerifier", "prompts.answer_column=answer")

# The text of a draft without the words that it no longer has.
WRITTEN = "one => [...one.childNodes].filter(part => part.nodeName !== 'DEL').map(part => part.textContent).join('')"


@pytest.fixture(scope="module")
def url(browser, tiny_model) -> Iterator[str]:
    from tests.wiring.serve.fake import FakeReplica

    with serving(str(tiny_model), FakeReplica, *SCORING) as found:
        yield found.url


class Visit:
    """The page at a width, and all that it asked for and complained about."""

    def __init__(self, browser: Any, url: str, width: int = 1280, key: str = KEYS[0]):
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.width = width
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.goto(url)
        self.page.get_by_label("Key").fill(key)

    def refine(self, prompt: str, **fields: str) -> None:
        self.page.get_by_label("Prompt", exact=True).fill(prompt)
        self.page.locator("details").evaluate("one => one.open = true")
        for label, value in fields.items():
            field = self.page.get_by_label(label, exact=True)
            (field.select_option if label in ("Strategy", "Answer is") else field.fill)(value)
        self.page.get_by_role("button", name="Refine").click()

    def done(self) -> str:
        """The status line of the end."""
        return self.await_text("#status", "Done")

    def await_text(self, selector: str, pattern: str) -> str:
        """The text of an element when it matches; the policy of the page lets no test evaluate a condition in it."""
        from playwright.sync_api import expect

        found = self.page.locator(selector).first
        expect(found).to_have_text(re.compile(pattern), timeout=30_000)
        return found.inner_text()

    def drafts(self) -> list[Any]:
        return self.page.locator("#drafts > li").all()

    def texts(self) -> list[str]:
        return self.page.eval_on_selector_all("#drafts pre", "found => found.map(one => one.textContent)")


@pytest.fixture(params=WIDTHS)
def visit(request, browser, url) -> Iterator[Visit]:
    found = Visit(browser, url, request.param)
    yield found
    assert [said for said in found.said if "401" not in said] == []
    assert {re.sub(r"/v1/.*|/$", "", asked) for asked in found.asked} == {url}, "nothing is loaded from elsewhere"
    found.page.close()


def fits(visit):
    inside = visit.page.eval_on_selector_all(
        "form *, #drafts *", "found => found.map(one => one.getBoundingClientRect()).map(box => [box.left, box.right])"
    )
    assert visit.page.evaluate("document.documentElement.scrollWidth") == visit.width
    assert [box for box in inside if box[0] < 0 or box[1] > visit.width] == []


def test_rounds_appear_with_their_figures_and_what_changed(visit):
    visit.refine("words", Rounds="3", Seed="4", **{"Known right answer, for the scorer": "x"})
    assert re.fullmatch(r"Done: all rounds are done, 75 tokens written, \d+\.\d\d s", visit.done())
    drafts = visit.drafts()
    assert [draft.locator("h2").inner_text() for draft in drafts] == ["Round 1", "Round 2", "Round 3"]
    for draft in drafts:
        assert re.search(r"25 tokens", draft.inner_text())
        assert re.search(r"\d\.\d\d s", draft.inner_text())
        assert re.search(r"score ", draft.inner_text())
    assert drafts[0].locator("ins, del").count() == 0
    texts = [draft.locator("pre").evaluate(WRITTEN) for draft in drafts]
    for place in (1, 2):
        assert drafts[place].locator("del").all_inner_texts() == [texts[place - 1].split()[2]]
        assert drafts[place].locator("ins").all_inner_texts() == [texts[place].split()[2]]
    assert [draft.get_attribute("class") or "" for draft in drafts] == ["", "", "answer"]
    fits(visit)
    visit.page.get_by_label("Mark what changed").uncheck()
    assert not drafts[1].locator("del").first.is_visible()


def test_drafts_are_seen_while_they_are_written_and_stop_ends_them(visit):
    visit.refine("slow")
    seen = visit.await_text("#drafts pre", ".{4,}")
    assert visit.page.locator("#status").inner_text() == "Writing round 1"
    assert visit.await_text("#drafts pre", f".{{{len(seen) + 5},}}").startswith(seen)
    assert visit.page.get_by_role("button", name="Refine").is_disabled()
    visit.page.get_by_role("button", name="Stop").click()
    visit.await_text("#status", "^Stopped by you after")
    assert visit.page.get_by_role("button", name="Refine").is_enabled()
    assert len(visit.texts()) == 1


def test_hostile_text_is_shown_and_never_obeyed(visit):
    shown: set[str] = set()
    for seed in range(4):
        visit.refine("hostile", Rounds="4", Seed=str(seed))
        visit.done()
        visit.page.get_by_label("Mark what changed").uncheck()
        fits(visit)
        shown |= {draft.locator("pre").inner_text() for draft in visit.drafts()}
        assert visit.page.evaluate("window.hacked") is None
        assert visit.page.evaluate("document.querySelectorAll('#drafts :not(li, div, h2, span, pre, ins, del)').length") == 0
        assert visit.page.evaluate("getComputedStyle(document.body).display") == "block"
        visit.page.get_by_label("Mark what changed").check()
    assert len(shown & set(HOSTILE)) >= 3


def test_samples_and_critiques_have_their_places(visit):
    visit.refine("words", Strategy="parallel", Samples="3", **{"Answer is": "vote"})
    visit.done()
    assert sorted(draft.locator("h2").inner_text() for draft in visit.drafts()) == [
        "Round 1, sample 1", "Round 1, sample 2", "Round 1, sample 3"
    ]  # fmt: skip
    assert visit.page.locator("#drafts li.answer").count() == 1
    fits(visit)


def test_errors_are_said_in_words(visit):
    visit.page.get_by_label("Key").fill("wrong-key-0123456789")
    visit.refine("words")
    alert = visit.page.get_by_role("alert")
    visit.await_text("#error", "the key is missing or wrong")
    visit.page.get_by_label("Key").fill(KEYS[0])
    visit.refine("words")
    visit.done()
    assert alert.inner_text() == ""


def test_the_keyboard_is_enough(browser, url):
    visit = Visit(browser, url)
    page = visit.page
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type("words")
    page.keyboard.press("Control+Enter")
    visit.done()
    page.get_by_label("Prompt", exact=True).focus()
    reached = []
    while reached[-1:] != ["PRE"]:  # a long draft can be scrolled by keys, too
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert reached == ["rounds", "strategy", "select", "key", "SUMMARY", "start", "changes", "PRE"]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_colour_schemes(browser, url, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.goto(url)
    colors = page.evaluate(
        "() => [...document.querySelectorAll('body, label, button')].map(one => [getComputedStyle(one).color,"
        " getComputedStyle(one.tagName === 'BUTTON' ? one : document.body).backgroundColor])"
    )
    assert min(contrast(*map(luminance, pair)) for pair in colors) >= 4.5
    page.close()


def luminance(color: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: float, other: float) -> float:
    """WCAG's ratio; 4.5 is its least for text."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_names_and_policy_hold_whatever_the_model_is_called():
    from evolve_ray.serve.page import HEADERS, page
    from tests.plain.serve.examples import settings

    text = page(settings(name=HOSTILE[0] + "'\"{{facts}}"))
    assert HOSTILE[0] not in text
    assert HEADERS["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
