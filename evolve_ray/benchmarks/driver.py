"""The command of jobs/benchmark.py: committed answers, a reference and a judge become win rates by model and round."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from evolve_ray.benchmarks import alpaca, arena_hard
from evolve_ray.benchmarks.answers import Answers, read_evaluation
from evolve_ray.benchmarks.judge import Judge, make_judge
from evolve_ray.errors import UserError, run_command
from evolve_ray.report.tables import aligned
from evolve_ray.store.files import sha256_file, write_atomic
from evolve_ray.store.places import run_folder
from evolve_ray.store.rows import digest
from evolve_ray.store.run import Run
from evolve_ray.watch.terminal import say


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description="Judges what jobs/evaluate.py generated, every model and round; the same command again continues.",
    )
    kinds = parser.add_subparsers(dest="benchmark", required=True)
    given = argparse.ArgumentParser(add_help=False)
    given.add_argument("evaluation", metavar="EVALUATION", help="the output folder of jobs/evaluate.py")
    given.add_argument("--judge", required=True, metavar="MODEL", help="the judge, by the name that its server knows it by")
    given.add_argument("--judge-url", required=True, metavar="URL", help="the server's base, e.g. http://127.0.0.1:8000/v1")
    given.add_argument("--api-key-env", metavar="NAME", help="the environment variable with the key (default: none is sent)")
    given.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: 8)")
    given.add_argument("--split", metavar="NAME", help="the split of the evaluation (default: the only one)")
    given.add_argument("--out", metavar="DIR", help="where results go (default: EVALUATION/benchmarks/BENCHMARK-DIGEST)")

    one = kinds.add_parser("alpaca_eval", parents=[given], help="AlpacaEval 2, raw and length-controlled")
    one.add_argument("--reference", required=True, metavar="FILE",
                     help="the reference's outputs, a list of instruction, output, generator; or a datasets name")  # fmt: skip
    one.add_argument("--length-control", choices=alpaca.LENGTH_CONTROLS, default="v1",
                     help="v1: AlpacaEval 2's; minimal: from lengths alone, for other instructions (default: v1)")  # fmt: skip
    one.add_argument("--gamed", metavar="FILE", help="df_gamed.csv of the dataset tatsu-lab/alpaca_eval (default: the hub's)")
    one.add_argument("--top-logprobs", type=int, default=5, metavar="N",
                     help="among how many tokens the verdict is looked for (default: AlpacaEval's 5)")  # fmt: skip
    one.add_argument("--judge-prompt", metavar="FILE", help="a ChatML template with {instruction}, {output_1}, {output_2} "
                     "(default: AlpacaEval 2's own, from its package)")  # fmt: skip

    two = kinds.add_parser("arena_hard", parents=[given], help="Arena-Hard v2")
    two.add_argument("--reference", required=True, metavar="FILE", help="the baseline's model_answer/NAME.jsonl")
    two.add_argument("--questions", metavar="FILE", help="question.jsonl (default: the file of the evaluation's split)")
    two.add_argument("--category", metavar="NAME", help="judge this category alone: each may have its own baseline")
    two.add_argument("--temperature", type=float, default=0.0, help="of the judge (default: 0)")
    two.add_argument("--max-tokens", type=int, default=16000, metavar="N", help="of a judgment (default: 16000)")
    two.add_argument("--judge-prompt", metavar="FILE", help="a TOML file with system and user (default: a prompt of our own)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code; a known fault is one sentence on stderr, the last line of the command."""
    given = parse(arguments)

    def command() -> int:
        judge = make_judge(given.judge, given.judge_url, given.api_key_env, given.concurrency)
        answers, source = read_evaluation(Path(given.evaluation), given.split)
        return (run_alpaca if given.benchmark == "alpaca_eval" else run_arena)(given, judge, answers, source)

    return run_command(command, shlex.join(["python", "jobs/benchmark.py", *arguments]))


def run_alpaca(given: argparse.Namespace, judge: Judge, answers: list[Answers], source: str) -> int:
    if not 2 <= given.top_logprobs <= 20:
        raise UserError(f"--top-logprobs {given.top_logprobs}: must be from 2 to 20, the most that the protocol gives")
    template = alpaca.template_of(given.judge_prompt)
    reference = alpaca.read_reference(given.reference)
    named = [judge.model, sha256_file(Path(template)), given.top_logprobs, reference]
    folder = out_folder(given, answers, named)
    with folder.locked():
        results = alpaca.run(answers, reference, judge, folder.root, say, template=template, top_logprobs=given.top_logprobs,
                             control=given.length_control, gamed=given.gamed)  # fmt: skip
        told = {"length_control": given.length_control, "top_logprobs": given.top_logprobs, "template": named[1]}
        return finish(given, judge, folder, results, told)


def run_arena(given: argparse.Namespace, judge: Judge, answers: list[Answers], source: str) -> int:
    asking = arena_hard.load_asking(given.judge_prompt, given.temperature, given.max_tokens)
    questions = arena_hard.read_questions(given.questions or source, given.category)
    baseline = arena_hard.read_baseline(given.reference)
    named = [judge.model, vars(asking), questions, baseline]
    folder = out_folder(given, answers, named)
    with folder.locked():
        results = arena_hard.run(answers, questions, baseline, judge, asking, folder.root, say)
        told = {
            "temperature": asking.temperature,
            "max_tokens": asking.max_tokens,
            "prompt": digest([asking.system, asking.user]),
        }
        return finish(given, judge, folder, results, told)


def out_folder(given: argparse.Namespace, answers: list[Answers], named: list) -> Run:
    """A folder that the same answers, reference, judge and prompt lead to again."""
    made_of = digest([given.benchmark, given.split, sorted({one.identity for one in answers}), named])[:12]
    folder = Run(run_folder(given.out or f"{given.evaluation}/benchmarks/{given.benchmark}-{made_of}"))
    models = ", ".join(dict.fromkeys(one.model for one in answers))
    say(f"{given.benchmark} of {models}, judged by {given.judge}, in {folder.root}")
    return folder


def finish(given: argparse.Namespace, judge: Judge, folder: Run, results: list[dict[str, Any]], told: dict[str, Any]) -> int:
    """Writes benchmark.json, prints the table, and says it if the judge was not understood."""
    found = {"benchmark": given.benchmark, "evaluation": str(Path(given.evaluation).resolve()), "reference": given.reference,
             "judge": {"model": judge.model, "url": judge.url, **told}, "results": results}  # fmt: skip
    data = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False).encode()
    write_atomic(folder.root / "benchmark.json", data)
    say("")
    say(text(found))
    if not any(row["n"] for row in results):
        way = (
            "return log-probabilities with m or M among the first"
            if given.benchmark == "alpaca_eval"
            else "end with [[A>B]] or alike"
        )
        say(f"\nno verdict could be read: the judge must {way}; see --judge-prompt and the other options of the judge")
    say(f"\nfigures: {folder.root / 'benchmark.json'}")
    return 0


def text(found: dict[str, Any]) -> str:
    """One line for each model and round (and category), for the terminal."""
    arena = found["benchmark"] == "arena_hard"
    header = ["model", "round"] + (["category", "win rate %", "contradictory", "tokens"] if arena else
              ["win rate %", "standard error", "length-controlled %", "standard error", "characters"])  # fmt: skip
    lines = []
    for row in found["results"]:
        if arena:
            low_high = f" [{row['low']:.1f}, {row['high']:.1f}]" if row["n"] else ""
            cells = [
                row["category"],
                number(row["win_rate"]) + low_high,
                str(row["num_contradictory"]),
                number(row["mean_tokens"]),
            ]
        else:
            controlled = row["no_length_control"] or number(row["length_controlled_win_rate"])
            cells = [number(row["win_rate"]), number(row["standard_error"], 2), controlled,
                     number(row["length_controlled_standard_error"], 2), number(row["mean_length"])]  # fmt: skip
        counts = [str(row[name]) for name in ("n", "num_unparsable", "num_missing")]
        lines.append([row["model"], f"y{row['round']}", *cells, *counts, row["baseline"]])
    return "\n".join(aligned([*header, "n", "unparsable", "missing", "against"], lines))


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"
