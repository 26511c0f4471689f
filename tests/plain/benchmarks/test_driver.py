"""The benchmarks' formats, scoring by hand, resumption and faults, against a fake judge behind the OpenAI protocol."""

import json
import math

import pytest

from evolve_ray.benchmarks import alpaca, answers, arena_hard
from evolve_ray.benchmarks.judge import make_judge
from evolve_ray.data.prompts import read_prompts
from evolve_ray.data.read import count_rows
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.store import rows
from tests.plain.benchmarks.examples import PROMPTS, arena, judge_alpaca, results, write_evaluation


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("... so [[A>>B]]", "A>>B"),
        ("first [[A>B]], no: [[b>a]]", "B>A"),
        ("in one bracket [A=B]", "A=B"),
        ("[[A]] means nothing", None),
        ("neither", None),
        ("", None),
    ],
)
def test_verdict_is_the_last_label_that_means_something(text, label):
    assert arena_hard.verdict(text) == label


def games(first, second):
    return [{"score": first}, {"score": second}]


@pytest.mark.parametrize(
    ("first", "second", "won"),
    [  # the model is B in the first game, A in the second
        ("B>A", "A>B", [1, 1]),
        ("A>B", "A>B", [1, 0]),
        ("A>>B", "B>A", [0, 0, 0, 0]),
        ("B>>A", "A=B", [0.5, 1, 1, 1]),
        ("A=B", "A=B", [0.5, 0.5]),
        (None, "A>B", None),
        ("A>B", None, None),
    ],
)
def test_battles_of_two_games_by_hand(first, second, won):
    assert arena_hard.battles(games(first, second)) == won


def test_win_rate_by_hand():
    pairs = [("B>A", "A>B"), ("A>>B", "A>B"), ("A=B", "A=B"), (None, "A>>B")]
    found = arena_hard.figures([{"games": games(*pair)} for pair in pairs])
    # 1 1 | 1 0 0 0 | 0.5 0.5
    assert found["win_rate"] == pytest.approx(100 * 4 / 8)
    assert (found["n"], found["num_unparsable"], found["num_contradictory"]) == (3, 1, 1)
    assert 0 < found["low"] < found["win_rate"] < found["high"] < 100
    assert arena_hard.figures([{"games": games(None, None)}])["win_rate"] is None


def test_markdown_is_counted_outside_of_code():
    text = "# a\n### b\n1. x\n- y\n* z\n**bold** and __bold__\n```\n# no\n- no\n```"
    found = arena_hard.markdown(text)
    assert found["header_count"] == {"h1": 1, "h2": 0, "h3": 1, "h4": 0, "h5": 0, "h6": 0}
    assert found["list_count"] == {"ordered": 1, "unordered": 2}
    assert found["bold_count"] == {"**": 1, "__": 1}


def by_round(messages):
    """Prefers round 2 to the baseline wherever it stands; cannot decide on round 1 when it stands first."""
    a, b = messages[1]["content"].split("<answer of assistant B>")
    if "round 2" in a + b:
        return "[[A>>B]]" if "round 2" in a else "[[B>A]]"
    return "hm" if "round 1" in a and "question 0" in a else "[[A>B]]"


def test_arena_hard_writes_its_formats_and_counts(place, judge, capsys):
    judge.decide = by_round
    assert arena(place, judge) == 0
    found = {(row["round"], row["category"]): row for row in results(place)}
    assert set(found) == {(number, category) for number in (1, 2) for category in ("hard_prompt", "creative_writing")}
    first, second = found[1, "hard_prompt"], found[2, "hard_prompt"]
    assert (first["win_rate"], first["n"], first["num_unparsable"], first["num_contradictory"]) == (50.0, 3, 1, 3)
    assert (second["win_rate"], second["n"], second["num_contradictory"]) == (100.0, 4, 0)
    assert len(judge.asked) == 2 * 2 * 6
    answer = rows.read_jsonl(place / "out" / "model_answer" / "org-m-y2.jsonl")[3]
    assert (answer["uid"], answer["model"]) == ("u3", "org-m-y2")
    assert answer["messages"] == [{"role": "user", "content": "question 3"},
                                  {"role": "assistant", "content": {"answer": "question 3: round 2!!!!!!"}}]  # fmt: skip
    assert set(answer["metadata"]) == {"token_len", "header_count", "list_count", "bold_count"}
    judged = rows.read_jsonl(place / "out" / "model_judgment" / "org-fake" / "org-m-y2.jsonl")
    row = next(one for one in judged if one["uid"] == "u3")
    assert (row["category"], row["judge"], row["model"], row["baseline"]) == ("hard_prompt", "org/fake", "org-m-y2", "base")
    assert [game["score"] for game in row["games"]] == ["B>A", "A>>B"]
    texts = [game["prompt"][1]["content"] for game in row["games"]]
    assert texts[0].index("baseline on") < texts[0].index("round 2")
    assert texts[1].index("round 2") < texts[1].index("baseline on")
    said = capsys.readouterr()
    assert "100.0 [51.0, 100.0]" in said.out, "four questions, of which none was lost, prove little"
    assert said.err == ""


def test_arena_hard_judges_only_what_is_not_judged(place, judge, capsys):
    judge.decide = by_round
    assert arena(place, judge) == 0
    before = results(place)
    file = place / "out" / "model_judgment" / "org-fake" / "org-m-y1.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:50])  # killed while it wrote
    judge.asked.clear()
    assert arena(place, judge) == 0
    assert len(judge.asked) == 2 * 2
    assert results(place) == before
    judge.asked.clear()
    assert arena(place, judge, "--category", "creative_writing", "--out", str(place / "other")) == 0
    assert len(judge.asked) == 2 * 2 * 2
    assert arena(place, judge, "--max-tokens", "9") == 2
    assert "was judged with other answers or settings; choose another --out" in capsys.readouterr().err


def test_failing_judge_is_one_sentence_and_what_is_judged_stays(place, judge, capsys):
    count = []

    def tire(messages):
        count.append(1)
        if len(count) == 6:
            judge.status = 401
        return "[[A>B]]"

    judge.decide = tire
    assert arena(place, judge, "--concurrency", "1") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --judge org/fake: request to {judge.url} failed: ")
    assert "not today" in said
    assert said.count("\n") == 1
    file = place / "out" / "model_judgment" / "org-fake" / "org-m-y1.jsonl"
    assert len(rows.read_jsonl(file)) == 3
    judge.status = 200
    judge.asked.clear()
    assert arena(place, judge) == 0
    assert len(judge.asked) == 2 * (12 - 3)


def test_key_comes_from_the_environment_and_stays_out_of_every_file(place, judge, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "secret-of-mine")
    monkeypatch.setenv("OPENAI_API_KEY", "another-secret")
    assert arena(place, judge, "--api-key-env", "MY_KEY") == 0
    assert judge.keys == {"Bearer secret-of-mine"}
    assert not [path for path in place.rglob("*") if path.is_file() and b"secret-of-mine" in path.read_bytes()]
    judge.keys.clear()
    assert arena(place, judge, "--out", str(place / "other")) == 0
    assert judge.keys == {"Bearer none"}, "a key that nobody named is sent to no server"
    capsys.readouterr()
    assert arena(place, judge, "--api-key-env", "NO_SUCH_KEY") == 2
    assert "--api-key-env NO_SUCH_KEY: this environment variable is not set" in capsys.readouterr().err


def test_faults_of_the_command_are_named(place, judge, capsys):
    for url, fault in (("localhost:8000", "is not an http address"), ("http://me:pw@host/v1", "contains a password")):
        with pytest.raises(UserError, match=fault):
            make_judge("m", url, None, 1)
    with pytest.raises(UserError, match="--concurrency 0"):
        make_judge("m", "http://host/v1", None, 0)
    assert arena(place, judge, "--split", "other") == 2
    assert arena(place, judge, "--category", "math") == 2
    assert arena(place, judge, "--questions", str(place / "baseline.jsonl")) == 2
    assert judge_alpaca(place, judge, "--top-logprobs", "50") == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error: --split other: unknown split; the evaluation has alpaca"
    assert "has no question of this category; its categories are creative_writing, hard_prompt" in said[1]
    assert "has no column 'category'" in said[2]
    assert "--top-logprobs 50: must be from 2 to 20" in said[3]
    assert len(said) == 4
    with pytest.raises(SystemExit):
        arena(place, judge, "--no-such-option")
    assert judge.asked == []


def test_evaluation_that_is_none_or_damaged_is_named(place):
    with pytest.raises(UserError, match=r"has no evaluation\.json; give the output folder"):
        answers.read_evaluation(place, None)
    (place / "evaluation" / "evaluation.json").write_text("{")
    with pytest.raises(IntegrityError, match="is damaged"):
        answers.read_evaluation(place / "evaluation", None)


def test_only_whole_chains_count(tmp_path):
    write_evaluation(tmp_path / "e", lambda prompt, number: f"{number}", lost={(2, 2)})
    found, source = answers.read_evaluation(tmp_path / "e", None)
    assert [one.name for one in found] == ["org-m-y1", "org-m-y2"]
    assert all(list(one.drafts) == [prompt for prompt in PROMPTS if prompt != "question 2"] for one in found)
    assert source == str(tmp_path / "question.jsonl")


def test_a_system_prompt_is_not_judged_and_a_conversation_is_refused_by_row():
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
    row = {"prompt": (system, user), "file": "f.jsonl", "line": 3}
    assert answers.one_turn(row) == answers.one_turn({**row, "prompt": "q"}) == "q"
    with pytest.raises(UserError, match=r"f\.jsonl:3: is a conversation of several turns"):
        answers.one_turn({**row, "prompt": (user, {"role": "assistant", "content": "a"}, user)})


def test_json_list_is_read_as_prompts(place):
    found, _ = read_prompts(str(place / "reference.json"), prompt_column="instruction")
    assert [(row["prompt"], row["line"]) for row in found] == [(prompt, n) for n, prompt in enumerate(PROMPTS, 1)]
    assert count_rows(str(place / "reference.json")) == 6
    (place / "odd.json").write_text('[{"instruction": "a"}, 3]')
    with pytest.raises(UserError, match=r"odd\.json:2: is a JSON int, but must be a JSON object"):
        read_prompts(str(place / "odd.json"), prompt_column="instruction")
    (place / "odd.json").write_text('[{"instruction": "a"}')
    with pytest.raises(UserError, match=r"odd\.json: is not a valid JSON list"):
        read_prompts(str(place / "odd.json"), prompt_column="instruction")
    (place / "lines.json").write_text('{"instruction": "a"}\n{"instruction": "b"}\n')
    assert len(read_prompts(str(place / "lines.json"), prompt_column="instruction")[0]) == 2


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "alpaca_eval", None)
    with pytest.raises(UserError, match=r"alpaca_eval: the package is not installed .*pip install -e '\.\[eval\]'"):
        alpaca.package()


def model_share(messages):
    """The model's share of the verdict: 0.9 in round 2, 0.25 in round 1, unreadable for question 5."""
    text = messages[1]["content"]
    if "question 5:" in text:
        return None
    share = 0.9 if "round 2" in text else 0.25
    return share if text.index('"m"') < text.index("round") < text.index('"M"') else 1 - share


def test_alpaca_eval_counts_and_does_not_ask_twice(place, judge, capsys):
    pytest.importorskip("alpaca_eval")
    judge.decide = model_share
    assert judge_alpaca(place, judge, "--length-control", "minimal") == 0
    first, second = results(place)
    assert (first["win_rate"], second["win_rate"]) == (pytest.approx(25), pytest.approx(90))
    for row in (first, second):
        assert (row["n"], row["num_unparsable"], row["num_missing"], row["standard_error"]) == (
            5,
            1,
            0,
            pytest.approx(0, abs=1e-9),
        )
    assert 0 < first["length_controlled_win_rate"] < 50 < second["length_controlled_win_rate"] < 100
    assert first["length_controlled_standard_error"] is None, "predictions that cannot differ have no standard error"
    assert len({" " in body["messages"][0]["role"] for body in judge.asked}) == 1
    assert {body["model"] for body in judge.asked} == {"org/fake-instruct"}
    outputs = json.loads((place / "out" / "outputs" / "org-m-y2.json").read_text())
    assert outputs[1] == {"instruction": "question 1", "output": "question 1: round 2!!", "generator": "org-m-y2",
                          "dataset": "own"}  # fmt: skip
    assert first["mean_length"] == int(sum(len(f"{prompt}: round 1") + int(prompt[-1]) for prompt in PROMPTS) / 6)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    judge.status, asked = 401, len(judge.asked)
    assert judge_alpaca(place, judge, "--length-control", "none") == 0
    assert len(judge.asked) == asked
    assert [row["win_rate"] for row in results(place)] == [first["win_rate"], second["win_rate"]]
    assert results(place)[0]["length_controlled_win_rate"] is None
    assert judge_alpaca(place, judge, "--length-control", "none", "--top-logprobs", "7") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: --judge org/fake-instruct: request to {judge.url} failed: ")
    assert "not today" in said


def test_length_control_by_difficulty_needs_the_table(place, judge, capsys):
    pytest.importorskip("alpaca_eval")
    judge.decide = lambda messages: 0.5 + 0.3 * math.sin(len(messages[1]["content"]))
    assert judge_alpaca(place, judge) == 2
    assert (
        "only those of AlpacaEval's 805 are published, but the reference has 6; use --length-control minimal"
        in capsys.readouterr().err
    )
    assert judge.asked == [], "the judge is not paid for what cannot be counted"
    table = place / "gamed.csv"
    lines = [f"{model},{n},{(-1) ** n * 0.4},{0.5 - 0.1 * sign},{sign * (0.5 + 0.1 * n)},False"
             for model, sign in (("concise", -1), ("verbose", 1)) for n in range(6)]  # fmt: skip
    table.write_text("\n".join(["model,index,instruction_difficulty,preference,std_delta_len,not_gamed_baseline", *lines]) + "\n")
    assert judge_alpaca(place, judge, "--gamed", str(table)) == 0
    for row in results(place):
        assert 0 < row["length_controlled_win_rate"] < 100
        assert row["length_controlled_standard_error"] is not None
    assert results(place)[0]["length_controlled_standard_error"] > 0, "its difficulties differ"
    table.write_text("model,index\na,1\n")
    assert judge_alpaca(place, judge, "--gamed", str(table)) == 2
    assert "must begin with the instructions 0 to 5 of the reference" in capsys.readouterr().err


def test_alpaca_eval_without_any_verdict_says_so(place, judge, capsys):
    pytest.importorskip("alpaca_eval")
    judge.decide = lambda messages: None
    assert judge_alpaca(place, judge, "--length-control", "minimal") == 0
    for row in results(place):
        assert (row["win_rate"], row["length_controlled_win_rate"], row["n"], row["num_unparsable"]) == (None, None, 0, 6)
    assert "no verdict could be read" in capsys.readouterr().out
