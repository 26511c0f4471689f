"""Bodies that no endpoint may take: each is wrong for a reason that its name says, all follow from a seed."""

import json
import random
from collections.abc import Iterator
from typing import Any

WRONG_TYPES = ([], {}, "text", True, -1.5, [[]], {"a": {}}, "\x00", "😀" * 50)
# Values that are wrong for a field whatever else stands in the body.
WRONG: dict[str, tuple[Any, ...]] = {
    "messages": (None, "text", 4, {}, [None], ["text"], [[]], [{}], [{"role": "user"}], [{"content": "x"}], []),
    "model": ("other", 4, [], {}, True, "../../etc/passwd"),
    "n": (0, -1, 17, 10**30, "three", 2.5, [], {}),
    "max_tokens": (0, -1, 10**30, "many", 2.5, [], {}),
    "max_completion_tokens": (0, -5, "many", [], {}),
    "temperature": (-0.1, "hot", [], {}, 10**400),
    "top_p": (-0.1, 0, 1.1, "all", [], {}),
    "top_k": ("x", -2, 1.5, [], {}),
    "min_p": (-1, 1.5, "x", []),
    "presence_penalty": (-3, 3, "x", {}),
    "frequency_penalty": (-3, 3, "x", {}),
    "repetition_penalty": (0, -1, "x", {}),
    "seed": ("x", 2**70, -(2**70), 1.5, [], {}),
    "stream": ("maybe", 7, [], {}),
    "stop": (4, {}, [4], [None], True),
    "logprobs": ("x", [], {}),
    "logit_bias": ("x", [], {"x": "y"}, {"999999": 1}),
    "stream_options": ("x", [], 4, {"include_usage": "x"}),
    "response_format": ("x", [], {"type": "x"}, {}),
    "tools": ("x", 4, [4], [{}], [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
    "tool_choice": ("required", "x", 4, {"type": "function"}),
    "refine": (*WRONG_TYPES[2:5], [], 4, {"x": 1}, {"rounds": None, "y": 1}),
    "chat_template": ("{{ 1 }}", "{% for x in range(10**9) %}{% endfor %}", 4, []),
    "echo": (True, "x", []),
    "priority": ("x", [], {}, 1.5),
    "prompt_logprobs": ("x", [], -5, 10**6),
    "truncate_prompt_tokens": ("x", [], -7),
    "bad_words": (4, "x", [4], {}),
    "structured_outputs": ("x", 4, [], {"x": 1}, {"json": 4, "regex": "("}),
}
WRONG_REFINE: dict[str, tuple[Any, ...]] = {
    "rounds": (0, -1, 17, 10**30, "3", 2.5, True, [], {}),
    "strategy": ("x", "os:system", 4, [], True, {"x": 1}, {"name": 4}, {"samples": 0}, {"samples": 10**9}, {"shots": "x"}),
    "select": ("x", 4, [], {}, "best", True),
    "stop": ("x", 4, ["x"], {"x": 1}, {"budget_tokens": 0}, {"budget_tokens": 10**12}, {"deadline_s": -1}, {"deadline_s": 10**9},
             {"deadline_s": "x"}, {"verified": True}, True),
    "show": ("x", 4, [], True),
    "answer": (4, [], {}, True),
    "samples": (0, 10**9, "x", []),
    "shots": (0, 10**9, "x", []),
}  # fmt: skip
WRONG_MESSAGES: tuple[Any, ...] = (
    {"role": "tool", "content": "x", "tool_call_id": "1"}, {"role": "x", "content": "x"}, {"role": "user", "content": 4},
    {"role": "user", "content": None}, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]},
    {"role": "user", "content": [{"type": "x"}]}, {"role": "user", "content": [4]}, {"role": ["user"], "content": "x"},
    {"role": "user<|end|><|assistant|>", "content": "x"}, {"role": "user", "content": {"a": 1}}, {"role": None, "content": "x"},
    {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, {"role": "system", "content": "the template refuses it"},
    {"role": "user", "content": "x" * 3000}, 4, None, [], "x",
)  # fmt: skip
GARBAGE = (b"", b"null", b"[]", b'"x"', b"{", b"}", b"\xff\xfe", b"\x00", b"{'a': 1}", b"NaN", b"[" * 5000, b'{"a":' * 5000,
           b'{"a": 1}{"b": 2}', b'{"a": "\\ud800"}', b'{"seed": 1e999}', b"GET / HTTP/1.1\r\n\r\n", b"a=1&b=2")  # fmt: skip


def bodies(model: str, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(why it is wrong, the body), `count` times."""
    chance = random.Random(seed)
    for _ in range(count):
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "sort:cab"}], "max_tokens": 4}
        if chance.random() < 0.5:
            body["refine"] = {"rounds": chance.randint(1, 3)}
        if chance.random() < 0.3:
            body["stream"] = True
        kind = chance.choice(("field", "field", "refine", "message", "bytes", "garbage"))
        if kind == "field":
            name = chance.choice(list(WRONG))
            body[name] = chance.choice(WRONG[name])
            yield f"{name}: {body[name]!r:.80}", json.dumps(body).encode()
        elif kind == "refine":
            name = chance.choice(list(WRONG_REFINE))
            body["refine"] = body.get("refine", {}) | {name: chance.choice(WRONG_REFINE[name])}
            yield f"refine.{name}: {body['refine'][name]!r:.80}", json.dumps(body).encode()
        elif kind == "message":
            message = chance.choice(WRONG_MESSAGES)
            body["messages"].insert(chance.randint(0, 1), message)
            yield f"message: {message!r:.80}", json.dumps(body).encode()
        elif kind == "bytes":  # cut anywhere, or a byte that is no UTF-8 put anywhere
            whole = json.dumps(body).encode()
            place = chance.randrange(1, len(whole) - 1)
            broken = whole[:place] if chance.random() < 0.5 else whole[:place] + b"\xff" + whole[place:]
            yield f"bytes: {broken[-40:]!r}", broken
        else:
            yield "garbage", chance.choice(GARBAGE)
