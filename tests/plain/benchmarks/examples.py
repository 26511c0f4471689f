"""An evaluation with its references, and a judge behind the OpenAI protocol."""

import http.server
import json
import math
import threading

from evolve_ray.benchmarks import driver
from evolve_ray.store import rows
from evolve_ray.store.manifest import commit
from evolve_ray.store.rows import GENERATION, PROMPT

PROMPTS = [f"question {n}" for n in range(6)]


class FakeJudge:
    """An OpenAI-compatible server whose verdict `decide(messages)` gives: an arena label, or the probability of the token m."""

    def __init__(self):
        self.decide = lambda messages: "[[A=B]]"
        self.asked = []
        self.keys = set()
        self.status = 200
        judge = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.asked.append(body)
                judge.keys.add(self.headers["Authorization"])
                status = judge.status
                data = json.dumps(judge.reply(body) if status == 200 else {"error": {"message": "not today"}}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reply(self, body):
        decided = self.decide(body["messages"])
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": decided or ""}}
        if body.get("logprobs"):
            tokens = {"x": 0.5} if decided is None else {"m": decided, "M": 1 - decided}
            top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in tokens.items() if p > 0]
            choice["message"]["content"] = "m"
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return {"id": "1", "object": "chat.completion", "created": 1, "model": "fake", "choices": [choice], "usage": usage}


def write_evaluation(folder, texts, model="org/m", split="alpaca", lost=()):
    """An output folder as jobs/evaluate.py leaves it; `texts(prompt, round)` is what the model answered."""
    asked = [{"prompt_id": f"p{n}", "prompt": prompt, "answer": None, "split": split, "file": "f", "line": n, "num_tokens": 3}
             for n, prompt in enumerate(PROMPTS)]  # fmt: skip
    drafts = [
        {"draft_id": f"p{n}r{number}", "prompt_id": f"p{n}", "split": split, "sample": 0, "round": number, "kind": "answer",
         "parent_id": None, "text": texts(prompt, number), "finish_reason": "stop", "num_prompt_tokens": 5,
         "num_tokens": len(texts(prompt, number)), "seed": 0, "model": "f" * 64}
        for n, prompt in enumerate(PROMPTS) for number in (1, 2) if (n, number) not in lost
    ]  # fmt: skip
    slug = f"{model.replace('/', '-')}-{'f' * 12}"
    generations = f"models/{slug}/chain/generations"
    tables = [("prompts", "prompts.parquet", asked, PROMPT), (generations, "shard-00000/rows.parquet", drafts, GENERATION)]
    for name, file, table, schema in tables:
        work = folder / f".{name.replace('/', '-')}"
        (work / file).parent.mkdir(parents=True)
        rows.write_table(work / file, table, schema)
        commit(work, folder / name, stage="fake", key="k")
    told = {"models": [{"name": model, "given": model, "model": "f" * 64, "path": "m"}],
            "config": {"evaluation": {"splits": {split: str(folder.parent / "question.jsonl")}}}}  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(told))
    return folder


def arena(place, judge, *more):
    return driver.main(["arena_hard", str(place / "evaluation"), "--reference", str(place / "baseline.jsonl"), "--judge",
                           "org/fake", "--judge-url", judge.url, "--out", str(place / "out"), *more])  # fmt: skip


def judge_alpaca(place, judge, *more):
    return driver.main(["alpaca_eval", str(place / "evaluation"), "--reference", str(place / "reference.json"), "--judge",
                           "org/fake-instruct", "--judge-url", judge.url, "--out", str(place / "out"), *more])  # fmt: skip


def results(place):
    return json.loads((place / "out" / "benchmark.json").read_text())["results"]
