"""The page as text: what it knows of the endpoint, what it may do, and that it loads nothing."""

import html
import json
import re

from evolve_ray.serve.page import HEADERS, page, policy
from tests.plain.runs import HOSTILE
from tests.plain.serve.examples import page_source, settings


def facts_of(text):
    (found,) = re.findall(r'data-facts="([^"]*)"', text)
    return json.loads(html.unescape(found))


def test_the_page_knows_the_limits_of_its_endpoint():
    facts = facts_of(page(settings(max_rounds=7, max_samples=5, keys=("hash",))))
    assert (facts["model"], facts["max_rounds"], facts["max_samples"], facts["rounds"]) == ("tiny@3", 7, 5, 4)
    names = ["chain", "parallel", "chains", "few_shot", "critique", "best_of", "feedback", "self_judge"]
    assert facts["strategies"] == names
    assert facts["strategy"] in facts["strategies"]
    assert (facts["scorer"], facts["keys"]) == (True, True)
    assert "hash" not in page(settings(keys=("hash",))).replace("hashed", "")


def test_a_hostile_name_stays_text():
    tags = page(settings()).count("<")
    for name in (*HOSTILE, "{{facts}}", "'\" onload='x"):
        text = page(settings(name=name))
        assert text.count("<") == tags
        assert f"<h1>{html.escape(name)}</h1>" in text or name == "{{facts}}"
        assert name == "{{facts}}" or facts_of(text)["model"] == name


def test_the_page_is_one_file_that_loads_nothing():
    text = page_source()
    assert not re.search(r"https?:|//[a-z]|\bsrc=|\burl\(|@import|<link|<iframe|<img", text.replace("// ", ""))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|cookie", text)
    assert not re.search(r"\son[a-z]+=|\sstyle=", text), "the policy would stop them"


def test_the_policy_allows_this_script_and_style_and_requests_to_its_own_origin():
    rules = dict(part.split(" ", 1) for part in policy().split("; "))
    assert rules["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules["style-src"])
    assert (rules["connect-src"], rules["frame-ancestors"]) == ("'self'", "'none'")
    assert HEADERS["X-Content-Type-Options"] == "nosniff"
