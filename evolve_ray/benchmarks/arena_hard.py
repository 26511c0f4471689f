"""Arena-Hard (arXiv 2406.11939): two games per question with positions swapped, verdicts, win rates.

This module writes question.jsonl, model_answer/NAME.jsonl and model_judgment/JUDGE/NAME.jsonl in the format of arena-hard-auto
v2, so that its show_result.py can read them. The judge's prompt is our own wording; `--judge-prompt` replaces it.
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

from evolve_ray.benchmarks.answers import Answers, file_name
from evolve_ray.benchmarks.judge import Judge
from evolve_ray.data import read
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.evaluate import intervals
from evolve_ray.refine.template import fill
from evolve_ray.store.files import write_atomic
from evolve_ray.store.rows import digest
from evolve_ray.watch import progress

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

DECISIVE = 3  # how many times a decisive verdict counts, as in Arena-Hard

# The battles that a verdict gives to the answer at position A: 1 won, 0 lost, 0.5 tied.
WORTH: dict[str, list[float]] = {
    "A>>B": [1.0] * DECISIVE, "A>B": [1.0], "A=B": [0.5], "A<B": [0.0], "A<<B": [0.0] * DECISIVE,
    "B>>A": [0.0] * DECISIVE, "B>A": [0.0], "B=A": [0.5], "B<A": [1.0], "B<<A": [1.0] * DECISIVE,
}  # fmt: skip
LABELS = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))


@dataclass(frozen=True)
class JudgePrompt:
    """The judge's prompt and sampling."""

    system: str
    user: str
    temperature: float
    max_tokens: int


def load_judge_prompt(path: str | None, temperature: float, max_tokens: int) -> JudgePrompt:
    """Returns the shipped prompt, or that of a TOML file: `system`, and `user` with {question}, {answer_a}, {answer_b}."""
    if path is None:
        return JudgePrompt(SYSTEM, USER, temperature, max_tokens)
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--judge-prompt {path}: cannot be read: {error}") from None
    if set(values) != {"system", "user"} or not all(isinstance(text, str) for text in values.values()):
        raise UserError(f"--judge-prompt {path}: must have the two strings `system` and `user`, and nothing else")
    for name in ("question", "answer_a", "answer_b"):
        if "{" + name + "}" not in values["user"]:
            raise UserError(f"--judge-prompt {path}: user: the field {{{name}}} is missing")
    return JudgePrompt(values["system"], values["user"], temperature, max_tokens)


def read_questions(path: str, category: str | None) -> dict[str, dict]:
    """Returns `{uid: question}` of a question.jsonl with the columns uid, category and prompt."""
    errors: list[str] = []
    questions: dict[str, dict] = {}
    for line, record in read.read_records(path, "train", errors):
        where = f"{path}:{line}"
        texts = [read.text_of(record, column, where, errors) for column in ("uid", "category", "prompt")]
        if all(texts) and questions.setdefault(str(texts[0]), record) is not record:
            errors.append(f"{where}: uid {texts[0]} occurs twice in the file")
    if errors:
        raise read.faults_error(path, errors)
    if category and category not in {record["category"] for record in questions.values()}:
        known = ", ".join(sorted({record["category"] for record in questions.values()}))
        raise UserError(f"--category {category}: {path} has no question of this category; its categories are {known}")
    return {uid: record for uid, record in questions.items() if category in (None, record["category"])}


def read_baseline(path: str) -> tuple[str, dict[str, dict]]:
    """Returns the baseline's name and `{uid: row}` of its model_answer file."""
    errors: list[str] = []
    rows_by_uid: dict[str, dict] = {}
    for line, record in read.read_records(path, "train", errors):
        try:
            answer_text(record)
            uid = str(record["uid"])
            if uid in rows_by_uid:
                errors.append(f"{path}:{line}: uid {uid} occurs twice in the file")
            rows_by_uid[uid] = {**record, "model": str(record["model"])}
        except (KeyError, IndexError, TypeError) as error:
            errors.append(f"{path}:{line}: is not a row of a model_answer file: missing {error}")
    if errors:
        raise read.faults_error(path, errors)
    names = sorted({row["model"] for row in rows_by_uid.values()})
    if len(names) != 1:
        raise UserError(
            f"--reference {path}: must hold the answers of one model, but holds those of {', '.join(names) or 'none'}"
        )
    return names[0], rows_by_uid


def answer_text(row: dict) -> str:
    """Returns the answer in a row of a model_answer file."""
    text = row["messages"][-1]["content"]["answer"]
    if not isinstance(text, str):
        raise TypeError("a text in messages[-1].content.answer")
    return text


def answer_row(uid: str, prompt: str, answers: Answers) -> dict[str, Any]:
    """Returns a row of model_answer/NAME.jsonl.

    `token_len` counts tokens of the model's own tokenizer; Arena-Hard itself counts those of GPT-4o's.
    """
    draft = answers.drafts[prompt]
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": {"answer": draft["text"]}}]
    style = {"token_len": draft["num_tokens"], **markdown(draft["text"])}
    return {"uid": uid, "ans_id": draft["draft_id"], "model": answers.name, "messages": messages, "tstamp": answers.committed,
            "metadata": style}  # fmt: skip


def markdown(text: str) -> dict[str, dict[str, int]]:
    """Returns the counts that Arena-Hard's style control uses: headings, list items and bold text outside of code blocks."""
    prose = re.sub(r"```[^`]*```", "", text)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, prose, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def verdict(text: str) -> str | None:
    """Returns the last label of a judgment; None if there is no valid label."""
    for pattern in LABELS:
        labels = pattern.findall(text.upper())
        if labels:
            return labels[-1] if labels[-1] in WORTH else None
    return None


def play_games(judge: Judge, judge_prompt: JudgePrompt, question: str, baseline: str, answer: str) -> list[dict[str, Any]]:
    """Plays two games: first the baseline is at position A, then the model."""
    games = []
    for first, second in ((baseline, answer), (answer, baseline)):
        user = fill(judge_prompt.user, question=question, answer_a=first, answer_b=second)
        reply = judge.answer(judge_prompt.system, user, temperature=judge_prompt.temperature, max_tokens=judge_prompt.max_tokens)
        messages = [{"role": "system", "content": judge_prompt.system}, {"role": "user", "content": user}]
        games.append({"score": verdict(reply), "judgment": {"answer": reply}, "prompt": messages})
    return games


def battles(games: list[dict[str, Any]]) -> list[float] | None:
    """Returns the model's battles of one question: 1 won, 0 lost, 0.5 tied; None unless both games have a verdict."""
    first, second = (game and game["score"] for game in games)
    if first not in WORTH or second not in WORTH:
        return None
    return WORTH[second] + [1.0 - won for won in WORTH[first]]


def figures(rows: list[dict]) -> dict[str, Any]:
    """Returns the win rate of the judged questions in %, as Arena-Hard counts it: every battle has the same weight.

    `low` and `high` are a 95 % interval over questions. (Arena-Hard resamples battles, as if those of one question were
    independent, and shows 90 %.) `num_unparsable` questions have a game without a verdict and do not count. In
    `num_contradictory` questions the winner changes when the answers swap positions.
    """
    scored = [battles_of_row for battles_of_row in (battles(row["games"]) for row in rows) if battles_of_row]
    results: dict[str, Any] = {"n": len(scored), "num_unparsable": len(rows) - len(scored), "win_rate": None}
    first_results = [1.0 - WORTH[row["games"][0]["score"]][0] for row in rows if battles(row["games"])]
    results["num_contradictory"] = sum(
        {battles_of_row[0], first} == {0.0, 1.0} for battles_of_row, first in zip(scored, first_results, strict=True)
    )
    if scored:
        rate = intervals.mean([sum(won) / len(won) for won in scored], weights=[len(won) for won in scored])
        results |= {"win_rate": 100 * rate["mean"], "low": 100 * rate["low"], "high": 100 * rate["high"]}
    return results


def read_judged(path: Path, keys: dict[str, str]) -> list[dict]:
    """Returns the rows of a judgment file if they belong to `keys`; drops a last line that was cut by a kill."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        write_atomic(path, b"".join(lines))
    try:
        rows = [json.loads(line) for line in lines]
        changed = any(keys.get(row["uid"]) != row["key"] for row in rows)
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{path}: is damaged; delete it to judge again, or choose another --out") from None
    if changed:
        raise UserError(f"{path}: was judged with other answers or settings; choose another --out")
    return rows


def judge_answers(answers: Answers, questions: dict[str, dict], baseline: dict[str, dict], judge: Judge,
                  judge_prompt: JudgePrompt, root: Path, say: Callable[[str], None]) -> list[dict]:  # fmt: skip
    """Writes the answers of one model and judges the missing ones; returns all judgments in the order of the questions."""
    own_questions = {
        uid: question for uid, question in questions.items() if question["prompt"] in answers.drafts and uid in baseline
    }
    lines = [json.dumps(answer_row(uid, row["prompt"], answers), ensure_ascii=False) + "\n" for uid, row in own_questions.items()]
    write_atomic(with_parent(root / "model_answer" / f"{answers.name}.jsonl"), "".join(lines).encode())
    path = with_parent(root / "model_judgment" / file_name(judge.model) / f"{answers.name}.jsonl")
    texts = {
        uid: (row["prompt"], answer_text(baseline[uid]), answers.drafts[row["prompt"]]["text"])
        for uid, row in own_questions.items()
    }
    keys = {uid: digest([judge.model, asdict(judge_prompt), *texts_of])[:16] for uid, texts_of in texts.items()}
    judged = read_judged(path, keys)
    todo = [uid for uid in own_questions if uid not in {row["uid"] for row in judged}]
    if todo:
        say(f"  {answers.name}: {len(todo)} questions, {2 * len(todo)} games")

    def play(uid: str) -> dict[str, Any]:
        games = play_games(judge, judge_prompt, *texts[uid])
        return {"uid": uid, "category": own_questions[uid]["category"], "judge": judge.model, "model": answers.name,
                "baseline": baseline[uid]["model"], "games": games, "key": keys[uid]}  # fmt: skip

    failure: BaseException | None = None
    with open(path, "a", encoding="utf-8") as file, ThreadPoolExecutor(judge.concurrency) as pool:
        futures: list[Future] = [pool.submit(play, uid) for uid in todo]
        try:
            for future in progress.each(as_completed(futures), len(futures), answers.name, "questions", say):
                if future.cancelled():
                    continue
                if future.exception():
                    failure = failure or future.exception()
                    for other in futures:  # requests in progress are paid for, so their results are kept
                        other.cancel()
                    continue
                file.write(json.dumps(future.result(), ensure_ascii=False) + "\n")
                file.flush()
                judged.append(future.result())
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failure:
        raise failure
    order = {uid: index for index, uid in enumerate(own_questions)}
    return sorted(judged, key=lambda row: order[row["uid"]])


def with_parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def run(all_answers: list[Answers], questions: dict[str, dict], baseline: tuple[str, dict[str, dict]], judge: Judge,
        judge_prompt: JudgePrompt, root: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:  # fmt: skip
    """Judges every model and round against the baseline; returns one dict of figures for each of them and each category."""
    name, rows = baseline
    if name in {answers.name for answers in all_answers}:
        raise UserError(f"--reference: its model has the name of an evaluated model, {name}; rename it in the file")
    if not any(question["prompt"] in all_answers[0].drafts and uid in rows for uid, question in questions.items()):
        raise UserError(
            "--reference: no question has an answer both in the evaluation and in the reference; give the question.jsonl that "
            "was evaluated, and the baseline's model_answer file for it"
        )
    write_lines(root / "question.jsonl", list(questions.values()))
    write_lines(root / "model_answer" / f"{file_name(name)}.jsonl", [rows[uid] for uid in questions if uid in rows])
    results = []
    for answers in all_answers:
        judged = judge_answers(answers, questions, rows, judge, judge_prompt, root, say)
        for category, size in collections.Counter(row["category"] for row in questions.values()).items():
            category_rows = [row for row in judged if row["category"] == category]
            lengths = [answers.drafts[questions[row["uid"]]["prompt"]]["num_tokens"] for row in category_rows]
            results.append({"model": answers.model, "round": answers.round, "name": answers.name, "category": category,
                            "baseline": name, **figures(category_rows), "num_missing": size - len(category_rows),
                            "mean_tokens": sum(lengths) / len(lengths) if lengths else None})  # fmt: skip
    return results


def write_lines(path: Path, rows: list[dict]) -> None:
    write_atomic(with_parent(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
