"""Arena-Hard (arXiv 2406.11939) in its own file formats: two games a question with positions swapped, verdicts, win rates.

Written are question.jsonl, model_answer/NAME.jsonl and model_judgment/JUDGE/NAME.jsonl as arena-hard-auto v2 reads them, so
that its own show_result.py takes them too. The wording of the judge's prompt is ours; `--judge-prompt` takes another.
"""

import collections
import json
import re
import tomllib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evolve_ray.benchmarks.answers import Answers, file_name
from evolve_ray.benchmarks.judge import Judge
from evolve_ray.data import read
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.refine.template import fill
from evolve_ray.store.files import write_atomic
from evolve_ray.store.rows import digest

SYSTEM = """\
You compare two answers to the same prompt, one by assistant A and one by assistant B, and say which is better.

First work out for yourself what a good answer would be. Then hold both answers against it: is what they say correct, does it \
do what the prompt asks for, does it leave out something that matters, does it carry needless text? Where the prompt can be \
read in several ways, asking back is better than guessing. The order of the answers and their length must not count.

Explain briefly, then end with exactly one of these labels:
[[A>>B]] A is much better
[[A>B]] A is slightly better
[[A=B]] both are about equally good
[[B>A]] B is slightly better
[[B>>A]] B is much better"""
USER = """\
<prompt>
{question}
</prompt>

<answer of assistant A>
{answer_a}
</answer of assistant A>

<answer of assistant B>
{answer_b}
</answer of assistant B>"""

# Arena-Hard's numbers: a decisive verdict counts three times; 100 resamplings, 5th and 95th percentile.
DECISIVE = 3
SAMPLES = 100

# What a verdict is worth to the answer at A: battles won.
WORTH: dict[str, list[float]] = {
    "A>>B": [1.0] * DECISIVE, "A>B": [1.0], "A=B": [0.5], "A<B": [0.0], "A<<B": [0.0] * DECISIVE,
    "B>>A": [0.0] * DECISIVE, "B>A": [0.0], "B=A": [0.5], "B<A": [1.0], "B<<A": [1.0] * DECISIVE,
}  # fmt: skip
LABELS = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))


@dataclass(frozen=True)
class Asking:
    """How the judge is asked."""

    system: str
    user: str
    temperature: float
    max_tokens: int


def load_asking(path: str | None, temperature: float, max_tokens: int) -> Asking:
    """The shipped prompt, or a TOML file with `system` and `user`; `user` has {question}, {answer_a}, {answer_b}."""
    if path is None:
        return Asking(SYSTEM, USER, temperature, max_tokens)
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--judge-prompt {path}: cannot be read: {error}") from None
    if set(tree) != {"system", "user"} or not all(isinstance(text, str) for text in tree.values()):
        raise UserError(f"--judge-prompt {path}: must have the two texts `system` and `user`, no more")
    for name in ("question", "answer_a", "answer_b"):
        if "{" + name + "}" not in tree["user"]:
            raise UserError(f"--judge-prompt {path}: user: lacks the field {{{name}}}")
    return Asking(tree["system"], tree["user"], temperature, max_tokens)


def read_questions(path: str, category: str | None) -> dict[str, dict]:
    """`{uid: question}` of a question.jsonl: uid, category, prompt."""
    faults: list[str] = []
    found: dict[str, dict] = {}
    for line, record in read.read_records(path, "train", faults):
        where = f"{path}:{line}"
        texts = [read.text_of(record, column, where, faults) for column in ("uid", "category", "prompt")]
        if all(texts) and found.setdefault(str(texts[0]), record) is not record:
            faults.append(f"{where}: uid {texts[0]} stands in the file twice")
    if faults:
        raise read.faults_error(path, faults)
    if category and category not in {record["category"] for record in found.values()}:
        known = ", ".join(sorted({record["category"] for record in found.values()}))
        raise UserError(f"--category {category}: {path} has no such question; its categories are {known}")
    return {uid: record for uid, record in found.items() if category in (None, record["category"])}


def read_baseline(path: str) -> tuple[str, dict[str, dict]]:
    """The baseline's name and `{uid: row}` of its model_answer file."""
    faults: list[str] = []
    found: dict[str, dict] = {}
    for line, record in read.read_records(path, "train", faults):
        try:
            answer_text(record)
            found[str(record["uid"])] = {**record, "model": str(record["model"])}
        except (KeyError, IndexError, TypeError) as error:
            faults.append(f"{path}:{line}: is no row of a model_answer file: lacks {error}")
    if faults:
        raise read.faults_error(path, faults)
    names = sorted({row["model"] for row in found.values()})
    if len(names) != 1:
        raise UserError(
            f"--reference {path}: must hold the answers of one model, but holds those of {', '.join(names) or 'none'}"
        )
    return names[0], found


def answer_text(row: dict) -> str:
    """The answer in a row of a model_answer file."""
    text = row["messages"][-1]["content"]["answer"]
    if not isinstance(text, str):
        raise TypeError("a text in messages[-1].content.answer")
    return text


def answer_row(uid: str, prompt: str, answers: Answers) -> dict[str, Any]:
    """A row of model_answer/NAME.jsonl. `token_len` counts tokens of the model's own tokenizer; Arena-Hard counts GPT-4o's."""
    draft = answers.drafts[prompt]
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": {"answer": draft["text"]}}]
    style = {"token_len": draft["num_tokens"], **markdown(draft["text"])}
    return {"uid": uid, "ans_id": draft["draft_id"], "model": answers.name, "messages": said, "tstamp": answers.committed,
            "metadata": style}  # fmt: skip


def markdown(text: str) -> dict[str, dict[str, int]]:
    """Headings, list items and bold passages outside of code blocks, by kind: what Arena-Hard's style control looks at."""
    plain = re.sub(r"```[^`]*```", "", text)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, plain, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def verdict(text: str) -> str | None:
    """The last label of a judgment; None where there is none that means something."""
    for pattern in LABELS:
        found = pattern.findall(text.upper())
        if found:
            return found[-1] if found[-1] in WORTH else None
    return None


def games(judge: Judge, asking: Asking, question: str, baseline: str, answer: str) -> list[dict[str, Any]]:
    """Two games: the baseline at A, then the model at A."""
    found = []
    for first, second in ((baseline, answer), (answer, baseline)):
        user = fill(asking.user, question=question, answer_a=first, answer_b=second)
        said = judge.answer(asking.system, user, temperature=asking.temperature, max_tokens=asking.max_tokens)
        asked = [{"role": "system", "content": asking.system}, {"role": "user", "content": user}]
        found.append({"score": verdict(said), "judgment": {"answer": said}, "prompt": asked})
    return found


def battles(both: list[dict[str, Any]]) -> list[float] | None:
    """The model's battles of one question: 1 won, 0 lost, 0.5 tied; None unless both games have a verdict."""
    first, second = (game and game["score"] for game in both)
    if first not in WORTH or second not in WORTH:
        return None
    return WORTH[second] + [1.0 - won for won in WORTH[first]]


def figures(rows: list[dict], seed: int = 0) -> dict[str, Any]:
    """The win rate of judged questions in %, as Arena-Hard counts: every battle of every question alike.

    `low` and `high` are the 5th and 95th percentile of resampled battles. `num_unparsable` questions have a game without a
    verdict and do not count; in `num_contradictory` the winner is another one when the answers change places.
    """
    scored = [found for found in (battles(row["games"]) for row in rows) if found]
    all_of = np.array([battle for found in scored for battle in found])
    out: dict[str, Any] = {"n": len(scored), "num_unparsable": len(rows) - len(scored), "win_rate": None}
    firsts = [1.0 - WORTH[row["games"][0]["score"]][0] for row in rows if battles(row["games"])]
    out["num_contradictory"] = sum({found[0], first} == {0.0, 1.0} for found, first in zip(scored, firsts, strict=True))
    if scored:
        draws = np.random.default_rng(seed).integers(len(all_of), size=(SAMPLES, len(all_of)))
        low, high = np.percentile(all_of[draws].mean(axis=1), [5, 95])
        out |= {"win_rate": 100 * float(all_of.mean()), "low": 100 * float(low), "high": 100 * float(high)}
    return out


def read_judged(path: Path, keys: dict[str, str]) -> list[dict]:
    """The rows of a judgment file that are still what they were asked to be; a line that was cut by a kill is dropped."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        write_atomic(path, b"".join(lines))
    try:
        found = [json.loads(line) for line in lines]
        changed = any(keys.get(row["uid"]) != row["key"] for row in found)
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{path}: is damaged; delete it to judge again, or choose another --out") from None
    if changed:
        raise UserError(f"{path}: was judged from other answers or in another way; choose another --out")
    return found


def judge_answers(answers: Answers, questions: dict[str, dict], baseline: dict[str, dict], judge: Judge, asking: Asking,
                  root: Path, say: Callable[[str], None]) -> list[dict]:  # fmt: skip
    """Writes one model's answers and judges what is not judged yet. Returns all of its judgments, in the questions' order."""
    mine = {uid: question for uid, question in questions.items() if question["prompt"] in answers.drafts and uid in baseline}
    lines = [json.dumps(answer_row(uid, row["prompt"], answers), ensure_ascii=False) + "\n" for uid, row in mine.items()]
    write_atomic(made(root / "model_answer" / f"{answers.name}.jsonl"), "".join(lines).encode())
    path = made(root / "model_judgment" / file_name(judge.model) / f"{answers.name}.jsonl")
    texts = {uid: (row["prompt"], answer_text(baseline[uid]), answers.drafts[row["prompt"]]["text"]) for uid, row in mine.items()}
    keys = {uid: digest([judge.model, asdict(asking), *parts])[:16] for uid, parts in texts.items()}
    judged = read_judged(path, keys)
    todo = [uid for uid in mine if uid not in {row["uid"] for row in judged}]
    if todo:
        say(f"  {answers.name}: {len(todo)} questions, {2 * len(todo)} games")

    def play(uid: str) -> dict[str, Any]:
        both = games(judge, asking, *texts[uid])
        return {"uid": uid, "category": mine[uid]["category"], "judge": judge.model, "model": answers.name,
                "baseline": baseline[uid]["model"], "games": both, "key": keys[uid]}  # fmt: skip

    fault: BaseException | None = None
    with open(path, "a", encoding="utf-8") as file, ThreadPoolExecutor(judge.concurrency) as pool:
        waiting: list[Future] = [pool.submit(play, uid) for uid in todo]
        try:
            for done in as_completed(waiting):
                if done.cancelled():
                    continue
                if done.exception():
                    fault = fault or done.exception()
                    for one in waiting:  # games under way are paid for: they are kept
                        one.cancel()
                    continue
                file.write(json.dumps(done.result(), ensure_ascii=False) + "\n")
                file.flush()
                judged.append(done.result())
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if fault:
        raise fault
    order = {uid: place for place, uid in enumerate(mine)}
    return sorted(judged, key=lambda row: order[row["uid"]])


def made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def run(all_answers: list[Answers], questions: dict[str, dict], baseline: tuple[str, dict[str, dict]], judge: Judge,
        asking: Asking, root: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:  # fmt: skip
    """Judges every model and round against the baseline; one dict of figures for each of them and each category."""
    name, rows = baseline
    if name in {answers.name for answers in all_answers}:
        raise UserError(f"--reference: its model is called {name} as an evaluated one is; rename it in the file")
    if not any(question["prompt"] in all_answers[0].drafts and uid in rows for uid, question in questions.items()):
        raise UserError(
            "--reference: no question has both an answer of the evaluation and one of the reference; give the question.jsonl "
            "that the evaluation was made with, and the baseline's model_answer file of it"
        )
    write_lines(root / "question.jsonl", list(questions.values()))
    write_lines(root / "model_answer" / f"{file_name(name)}.jsonl", [rows[uid] for uid in questions if uid in rows])
    results = []
    for answers in all_answers:
        judged = judge_answers(answers, questions, rows, judge, asking, root, say)
        for category, size in collections.Counter(row["category"] for row in questions.values()).items():
            here = [row for row in judged if row["category"] == category]
            if here:
                lengths = [answers.drafts[questions[row["uid"]]["prompt"]]["num_tokens"] for row in here]
                results.append({"model": answers.model, "round": answers.round, "name": answers.name, "category": category,
                                "baseline": name, **figures(here), "num_missing": size - len(here),
                                "mean_tokens": float(np.mean(lengths))})  # fmt: skip
    return results


def write_lines(path: Path, rows: list[dict]) -> None:
    write_atomic(made(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
