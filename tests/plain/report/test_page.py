"""A page that shows what was measured, hides nothing behind the network, and treats every text as text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import matplotlib
import pytest

from evolve_ray.config.load import load
from evolve_ray.config.resolve import resolved
from evolve_ray.refine.strategies import STRATEGIES
from evolve_ray.report import charts, page, recipe, report
from evolve_ray.report.charts import Point, Series
from evolve_ray.select.selections import SELECTIONS
from evolve_ray.store.rows import reject, write_jsonl
from evolve_ray.store.run import Run, Stage
from tests.plain.processes import ROOT
from tests.plain.runs import HOSTILE, chains, make_run

UP = [[0, 1]] * 30 + [[1, 1]] * 10
DOWN = [[1, 0]] * 30 + [[0, 0]] * 10
LEVEL = [[0, 1], [1, 0]] * 20
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "nav", "section", "h1", "h2", "h3", "p", "a", "div", "span",
    "small", "strong", "b", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "details",
    "summary", "fieldset", "legend", "label", "input", "pre", "svg", "g", "path", "defs", "use", "text", "clippath", "rect",
}  # fmt: skip
VOID = {"meta", "input"}


class Tree(HTMLParser):
    """Tags, attributes and text of a page; a tag that is not closed in its turn is a fault."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Run:
    answers = {
        "base": {"held": chains(DOWN), "other": chains(LEVEL)},
        "activation": {"held": chains(LEVEL), "other": chains(LEVEL)},
        **{f"iteration {number}": {"held": chains(UP), "other": chains(LEVEL)} for number in (1, 2, 3)},
    }
    return make_run(tmp_path_factory.mktemp("page") / "small", answers)


@pytest.fixture(scope="module")
def found(ran):
    return json.loads((ran.root / "report.json").read_bytes())


@pytest.fixture(scope="module")
def text(ran):
    return (ran.root / "report.html").read_text(encoding="utf-8")


def hostile_run(root):
    right = [[1, 0], [0, 1], [0, 0], [0, 1], [1, 0]]
    chain = {
        word: [(HOSTILE[0], before, before), (HOSTILE[place], after, after)]
        for place, (word, (before, after)) in enumerate(zip(HOSTILE, right, strict=True))
    }
    run = make_run(root, {"base": {"held": chain}, "iteration 1": {"held": chain}})
    stage = Stage(run.iteration(1) / "pairs", "pairs", "key")
    stage.start()
    stage.commit([], num_in=5, num_rows=2)
    (run.iteration(1) / "rejected.jsonl").write_text(json.dumps({"stage": HOSTILE[1], "reason": HOSTILE[2]}) + "\n")
    config = {"name": HOSTILE[0], "engine": {"actors": 1}, "prompts": {"path": HOSTILE[1]}, HOSTILE[2]: {HOSTILE[3]: HOSTILE[4]}}
    report.write(run, config, hostile_models(run))
    return run


def hostile_models(run):
    """The models of a run under names that are markup; split names too, as a hand-made report may have them."""
    models = json.loads((run.root / "report.json").read_bytes())["models"]
    for model, name in zip(models, HOSTILE, strict=False):
        model["splits"] |= {HOSTILE[3]: model["splits"]["held"], HOSTILE[4]: model["splits"]["held"]}
        model |= {"name": name, "decision": {"action": HOSTILE[0], "controller": HOSTILE[1], "reason": HOSTILE[2]}}
    return models


def test_every_text_of_others_stays_text(tmp_path):
    text = (hostile_run(tmp_path / "evil").root / "report.html").read_text(encoding="utf-8")
    tree = Tree(text)
    assert set(tree.tags) <= TAGS
    assert [pair for pair in tree.attributes if pair[1].startswith("on") or pair[1] in ("style", "src", "srcset", "action")] == []
    assert {value[0] for _, name, value in tree.attributes if name == "href"} == {"#"}
    assert tree.tags.count("style") == tree.tags.count("title") == 1
    assert tree.text.count("window.hacked") > 5
    assert not re.search("[\x00-\x08\x0b-\x1f]", text)


def test_hostile_chains_are_shown_as_they_were_written(tmp_path):
    run = make_run(tmp_path / "evil", {"iteration 1": {"held": chains([[0, 1], [1, 0]], texts=list(HOSTILE[:2]))}})
    shown = Tree((run.root / "report.html").read_text(encoding="utf-8")).text
    assert HOSTILE[0] in shown
    assert HOSTILE[1] in shown


def test_the_policy_allows_one_style_sheet_and_nothing_else(text):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    (style,) = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "url(" not in style
    assert "@import" not in style


def test_nothing_on_the_page_names_another_place(text):
    assert "http" not in text.replace("http-equiv", "")
    assert "//" not in text


def test_same_report_gives_the_same_bytes_whatever_the_users_drawing_settings_are(ran, found, text):
    given = (found, page.rejected_counts(ran), page.chains.collect(ran, found["models"]))
    assert page.render(*given) == text
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert page.render(*given) == text


def test_every_figure_has_a_description_its_numbers_and_ids_of_its_own(text):
    tree = Tree(text)
    ids = [value for _, name, value in tree.attributes if name == "id"]
    assert len(set(ids)) == len(ids) > 50
    drawings = re.findall(r"<figure>(.*?)</figure>", text, re.DOTALL)
    assert len(drawings) >= 10
    for drawing in drawings:
        assert re.search(r'<svg viewBox="0 0 [\d.]+ [\d.]+" role="img" aria-label="[^"]{20,}"', drawing)
        assert re.search(r"<details><summary>Numbers</summary><div class=\"wide\".*<td", drawing)
        assert "<text" in drawing
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert set(used) <= set(ids)


@pytest.mark.parametrize(
    ("right", "told"),
    [(UP, "refinement helps"), (DOWN, "refinement hurts"), (LEVEL, "no clear effect")],
    ids=["up", "down", "level"],
)
def test_the_answer_says_what_the_interval_allows(tmp_path, right, told):
    answers = {"base": {"held": chains(2 * LEVEL)}, "iteration 1": {"held": chains(2 * right)}}
    text = (make_run(tmp_path, answers).root / "report.html").read_text(encoding="utf-8")
    assert told in Tree(answer_of(text)).text


def test_the_answer_says_nothing_from_few_prompts(text):
    shown = Tree(answer_of(text)).text
    assert "(40 prompts)" in shown
    assert "too few prompts to say, at least 50 are needed" in shown
    assert "+75.0 points" in shown
    assert "\N{BLACK UP-POINTING TRIANGLE}" not in shown


def answer_of(text):
    return re.search(r'<section id="answer">.*?</section>', text, re.DOTALL)[0]


def test_the_answer_shows_gain_and_way_of_the_last_model(text):
    shown = Tree(answer_of(text)).text
    assert "+75.0 points" in shown
    assert "75.0 \N{RIGHTWARDS ARROW} 25.0" in shown  # y1, base to iteration 3
    assert "0.0 \N{RIGHTWARDS ARROW} 100.0" in shown  # y2


def test_a_model_that_was_rolled_back_is_not_the_answer(found):
    models = [*found["models"][:3], {**found["models"][0], "name": "iteration 2", "iteration": 2, "rolled_back": True}]
    text = page.render({**found, "models": models}, [], [])
    assert "+75.0 points" in answer_of(text)
    assert "iteration 2 (rolled back)" in text


def test_transitions_are_counted_by_direction(text):
    part = re.search(r'<section id="transitions">.*?</section>', text, re.DOTALL)[0]
    rows = re.findall(r'<th scope="row">(.*?)</th>((?:<td class="n">\d+</td>)+)', part)
    cells = {name: [int(cell) for cell in re.findall(r"\d+", cells.replace("td", ""))] for name, cells in rows[:5]}
    assert cells["iteration 3"] == [30, 0, 10, 0, 10, 40]  # to right, to wrong, kept right, kept wrong, same text, prompts
    assert cells["base"] == [0, 30, 0, 10, 10, 40]


def test_each_round_has_its_gain_in_the_numbers(text):
    part = re.search(r'<section id="gain">.*?</section>', text, re.DOTALL)[0]
    assert '<th scope="col">y2 - y1</th>' in part
    assert re.search(r"75\.0 \[\d\d\.\d, \d\d\.\d\]", part)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_told_in_words(path):
    told = dict(recipe.sentences(resolved(load(path))))
    assert {"model", "prompts", "drafts", "scorer", "pairs", "training", "evaluation", "seed"} <= set(told)
    assert not any("{" in sentence or "None" in sentence for sentence in told.values())


def test_every_plug_that_we_ship_has_its_words():
    assert set(recipe.WORDS["strategy.name"]) == set(STRATEGIES)
    assert set(recipe.WORDS["selection.name"]) == set(SELECTIONS)


def test_a_plug_from_elsewhere_keeps_its_name():
    told = dict(recipe.sentences({"scorer": {"name": "mine:Judge", "model": ""}}))
    assert told == {"scorer": "mine:Judge"}


def test_reasons_of_rejected_rows_are_counted_together_beyond_their_numbers(ran):
    rows = [
        {"stage": "pairs", "reason": "duplicate of line 7"},
        {"stage": "pairs", "reason": "duplicate of line 8"},
        {"stage": "pairs", "reason": "selection.margin is 0.5"},
    ]
    (ran.iteration(1) / "rejected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = page.rejected_counts(ran)
    (ran.iteration(1) / "rejected.jsonl").unlink()
    assert found == [(1, "pairs", "duplicate of line N", 2), (1, "pairs", "selection.margin is 0.5", 1)]


def test_reasons_of_lines_as_stages_write_them_are_counted(tmp_path):
    run = Run(tmp_path)
    run.iteration(1).mkdir()
    found = [reject({"id": f"d{n}"}, "pairs", f'margin {n}, "reason":"x"') for n in range(3)]
    found.append(reject({"id": "p"}, "prompts", "too long", num_tokens=9, limit=5))
    write_jsonl(run.iteration(1) / "rejected.jsonl", found)
    assert page.rejected_counts(run) == [(1, "pairs", 'margin N, "reason":"x"', 3), (1, "prompts", "too long", 1)]


def test_parts_that_were_not_measured_are_left_out():
    bare = {"name": "small", "config": {}, "models": [{"name": "base", "iteration": 0, "splits": {}}], "stages": []}
    tree = Tree(page.render(bare, [], []))
    assert tree.tags.count("section") == 0
    assert tree.tags.count("svg") == 0


def test_without_a_verifier_the_reward_speaks(tmp_path):
    silent = {prompt: [(text, score, None) for text, score, _ in chain] for prompt, chain in chains(UP).items()}
    run = make_run(tmp_path, {"iteration 1": {"held": silent}})
    text = (run.root / "report.html").read_text(encoding="utf-8")
    assert "+0.750" in answer_of(text)
    assert "higher reward" in text


def test_more_than_nine_rounds_stand_in_their_order(tmp_path, found):
    run = make_run(tmp_path, {"base": {"held": chains([[0] * 9 + [1, 1]] * 5)}})
    report = json.loads((run.root / "report.json").read_bytes())
    split = report["models"][0]["splits"]["held"]
    split["rounds"] = dict(sorted(split["rounds"].items()))  # as canonical JSON has them: "1", "10", "11", "2"
    text = page.render(report, [], [])
    assert text.index(">y9<") < text.index(">y10<") < text.index(">y11<")
    cells = re.search(r'<tr><th scope="row">base</th>(.*?)</tr>', text[text.index('id="rounds"') :])[1]
    assert [float(cell) for cell in re.findall(r">([\d.]+) \[", cells)][:11] == [0.0] * 9 + [100.0] * 2


def test_cost_drift_compute_and_decisions_are_shown_where_a_report_has_them(found):
    line = {"iteration": 1, "stage": "generations", "seconds": 12.5, "num_in": 10, "num_rows": 40, "idle_seconds": 3.25}
    total = {"seconds": 12.5, "num_tokens": 4321}
    drift = {
        "num_drafts": 40, "mean_response_tokens": 9.5, "tokens_ratio": 1.25, "cut_rate": 0.01, "duplicate_rate": 0.2,
        "unchanged_rate": 0.3, "score_tokens": {"all": 0.1, "within_prompt": -0.12}, "winning_rounds": {"1": 3, "4": 17},
        "truth": {"pair_order": {"share": 0.913}, "labels": {"accuracy": 0.854}},
    }  # fmt: skip
    step = found["models"][-1]["splits"]["held"]["rounds"]["1"]
    compute = {
        "model": "iteration 3", "iteration": 3, "split": "held", "chain": [{"round": 1, "mean_tokens": 7.75, **step}],
        "best_of": {"num_responses": 2, **{side: {"mean_tokens": 15.5, **step} for side in ("chain", "parallel")}},
    }  # fmt: skip
    last = {
        **found["models"][-1],
        "drift": drift,
        "decision": {"action": "roll_back", "controller": "guard", "split": "held", "reason": "y1 fell"},
    }
    more = {
        "models": [*found["models"][:-1], last], "checkpoint": "/run/iteration-02/checkpoint", "compute": [compute],
        "ledger": {"stages": [line], "iterations": [{"iteration": 1, **total}], "total": total, "clock": [
            {"iteration": 1, "seconds": 50.0, "engines": 20.0, "scoring": 1.0, "updates": 10.0, "starts": 12.0, "waiting": 3.0,
             "rest": 4.0}]},
    }  # fmt: skip
    shown = Tree(page.render({**found, **more}, [(1, "pairs", "too long", 1234)], [])).text
    for part in (
        "4,321",
        "12.5",
        "Where the time went",
        "12.0 (24%)",
        "1,234",
        "too long",
        "91.3",
        "85.4",
        "y4: 17",
        "roll back",
        "y1 fell",
        "7.8",
        "best of 2, parallel",
    ):
        assert part in shown
    assert "/run/iteration-02/checkpoint" in shown


@pytest.mark.slow
def test_a_page_of_three_iterations_is_below_five_megabytes(tmp_path):
    """Long texts of characters that HTML makes longer, six splits, four rounds."""
    long = ['<&"' * 40_000 + str(place) for place in range(40)]
    right = [[0, 1, 0, 1], [1, 0, 1, 0]] * 20
    answers = {name: {f"split-{n}": chains(right, texts=long) for n in range(6)} for name in ("base", "activation")}
    answers |= {
        f"iteration {n}": {f"split-{m}": chains(right, tag='<&"' * 2_000, texts=long) for m in range(6)} for n in (1, 2, 3)
    }
    run = make_run(tmp_path, answers)
    assert (run.root / "report.html").stat().st_size < 5_000_000


def test_a_drawing_takes_a_label_for_text_and_no_formula():
    series = [Series("a", "a", "o", [Point(0, 1.0, 0.5, 1.5)])]
    drawing = charts.lines("one", "a description", series, ["$\\frac{1}{$"], y="<b>&")
    assert "$\\frac{1}{$</text>" in drawing
    assert "&lt;b&gt;&amp;</text>" in drawing


def test_a_long_label_keeps_its_end_where_that_tells_models_apart():
    assert charts.short("some long run name: iteration 3", 22, 12) == "some long\N{HORIZONTAL ELLIPSIS} iteration 3"
    assert charts.short("iteration\n3") == "iteration 3"


def test_inks_are_told_apart_from_the_page_and_follow_the_colour_scheme(text):
    """Contrast of at least 3:1 (WCAG 2.2, 1.4.11) of every mark to the card it stands on, in both schemes."""
    for scheme, ground in ((0, "#f6f7f9"), (1, "#1d2126")):
        assert f"--card:{ground}" in text
        for name, pair in charts.COLORS.items():
            if name != "grid":
                assert contrast(pair[scheme], ground) >= 3.0, (name, scheme)
    assert set(re.findall(r'(?:fill|stroke)="(#[^"]*)"', text)) == set()


def contrast(one, other):
    def luminance(color):
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
