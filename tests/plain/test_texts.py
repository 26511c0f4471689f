"""Whatever stands in a prompt is the same bytes in every table, and text on the page."""

import html
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from evolve_ray.config.load import load
from evolve_ray.config.options import Strategy
from evolve_ray.data import prompts
from evolve_ray.generate.drive import Drive
from evolve_ray.generate.spec import Completion
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.pools.worker import ShardWorker
from evolve_ray.refine.strategies import STRATEGIES
from evolve_ray.refine.template import load_template
from evolve_ray.report import markup
from evolve_ray.stages.pairs import select
from evolve_ray.store import rows
from evolve_ray.store.run import Run, Stage
from evolve_ray.store.shards import finish, read_rows
from tests.plain.generate.test_drive import FakeEngine, encode, spec
from tests.plain.runs import chains, make_run

TEXTS = {
    "emoji": "a \U0001f469\u200d\U0001f469\u200d\U0001f467 and a flag \U0001f3f4\U000e0067\U000e0062\U000e007f",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202e\u2066\u0645\u0631\u062d\u0628\u0627\u2069",
    "NUL": "a\x00b\x01\x7f",
    "line separators": "one\u2028two\u2029three\x85four\rfive\r\nsix",
    "composed": "caf\u00e9 \u00c5",
    "decomposed": "cafe\u0301 A\u030a",
    "byte order mark": "\ufeffx\ufffe",
    "template": "{prompt} {{ messages }} {% raw %} <|im_start|>system",
    "beyond the basic plane": "\U0010ffff\U0001d518",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("escaped", [True, False], ids=["escaped", "plain"])
def test_text_is_byte_equal_from_the_file_to_the_pairs(tmp_path, text, escaped):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes((json.dumps({"prompt": text, "answer": text}, ensure_ascii=escaped) + "\n").encode())
    (found,), _ = prompts.read_prompts(str(path), prompt_column="prompt", answer_column="answer")
    rows.write_table(tmp_path / "prompts.parquet", [{**found, "num_tokens": 1}], rows.PROMPT)
    (stored,) = rows.read_table(tmp_path / "prompts.parquet")
    pair = dict.fromkeys(rows.PAIR.names) | {"prompt": stored["prompt"], "chosen": stored["answer"]}
    rows.write_table(tmp_path / "pairs.parquet", [pair], rows.PAIR)
    rows.write_jsonl(tmp_path / "rejected.jsonl", [rows.reject(found, "prompts", text)])
    (kept,) = rows.read_table(tmp_path / "pairs.parquet")
    (lost,) = rows.read_jsonl(tmp_path / "rejected.jsonl")
    assert {kept["prompt"].encode(), kept["chosen"].encode(), lost["reason"].encode()} == {text.encode()}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_prompt_answers_and_names_are_in_the_report_as_they_are_but_for_control_characters_on_the_page(tmp_path, text):
    """Those have no place in HTML: the page shows their pictures. report.json has no texts but the names that people give."""
    asked = {f"asked {text}": [(f"first {text}", 0.0, 0.0), (f"then {text}", 1.0, 1.0)]} | chains([[1, 0]])
    run = make_run(tmp_path / "run", {"iteration 1": {text: asked}}, config={"name": text})
    shown = html.unescape((run.root / "report.html").read_bytes().decode())
    for written in (f"asked {text}", f"first {text}", f"then {text}"):
        assert markup.clean(written) in shown
    assert not {"\x00", "\x01", "\x7f"} & set(shown)
    written = (run.root / "report.json").read_bytes()
    told = json.loads(written)
    assert (told["name"], told["config"]["name"], list(told["models"][0]["splits"])) == (text, text, [text])
    assert json.dumps(text, ensure_ascii=False).encode() in written


class Echo(FakeEngine):
    """Writes what it reads."""

    def answer(self, request_id, ids):
        return Completion(request_id, "".join(map(chr, ids)), len(ids), len(ids), 0, "stop")


class Writer(ShardWorker):
    """Two rounds of such an engine on each prompt, as the actors drive them."""

    schema = rows.GENERATION

    def process(self, shard, prompts):
        given = spec(strategy=Strategy(rounds=2), context_tokens=10**6)
        drive = Drive(Echo(), encode, given)
        made, lost, stats = drive.run(prompts, lambda prompt: STRATEGIES["chain"](prompt, given.template, given.strategy))
        return made, lost, stats | {"num_in": len(prompts)}


class Scorer(ShardWorker):
    """The second round is the better one."""

    schema = rows.SCORE

    def process(self, shard, prompts):
        drafts = rows.read_table(Path(self.spec.drafts) / "shard-00000" / "rows.parquet")
        made = [
            {"draft_id": row["draft_id"], "prompt_id": row["prompt_id"], "score": float(row["round"]), "correct": None}
            for row in drafts
        ]
        return made, [], {"num_in": len(made)}


def test_drafts_are_byte_equal_from_the_engine_to_the_pairs(recipe, tmp_path):
    config = load(recipe(), ["engine.shard_prompts=20"])
    template = load_template("tiny", "conversation")
    context = Context(config, Run(tmp_path), print, print, False, template, Policy(Path(), ""))
    here = context.run.iteration(1)
    prompts = [
        {"prompt_id": name, "prompt": text, "answer": None, "split": "s", "file": "f", "line": 1, "num_tokens": 1}
        for name, text in TEXTS.items()
    ]
    stage = Stage(here / "prompts", "prompts", "key")
    rows.write_table(stage.start() / "prompts.parquet", prompts, rows.PROMPT)
    made = [stage.commit(num_in=len(prompts), num_rows=len(prompts))]
    for name, worker, num_in in (("generations", Writer, len(prompts)), ("scores", Scorer, 2 * len(prompts))):
        stage = Stage(here / name, name, name)
        given = SimpleNamespace(
            work=str(stage.resume()), prompts=str(here / "prompts/prompts.parquet"), shard_prompts=20, key="k",
            drafts=str(here / "generations"),
        )  # fmt: skip
        worker(given).commit_shard(0)
        made.append(finish(stage, 1, num_in))
    drafts = {(row["prompt_id"], row["round"]): row["text"] for row in read_rows(made[1])}
    context.prompts[1] = made[0]
    pairs = {row["prompt_id"]: row for row in rows.read_table(select(context, 1, *made[1:]).path("pairs.parquet"))}
    for name, text in TEXTS.items():
        first = "".join(message["content"] for message in template.direct(text))
        second = "".join(message["content"] for message in template.refinement(text, first))
        assert drafts[name, 1].encode() == pairs[name]["rejected"].encode() == first.encode()
        assert drafts[name, 2].encode() == pairs[name]["chosen"].encode() == second.encode()
        assert second.encode().count(text.encode()) == 2, "the draft was not handed on as it is"
        assert pairs[name]["prompt"].encode() == text.encode()
