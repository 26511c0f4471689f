"""The command jobs/benchmark.py: computes win rates by model and round from committed answers, a reference and a judge."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from evolve_ray.benchmarks import alpaca, arena_hard
from evolve_ray.benchmarks.answers import Answers, read_evaluation
from evolve_ray.benchmarks.judge import Judge, make_judge
from evolve_ray.config.run_options import MIN_PROMPTS
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
        description="Judges the answers of jobs/evaluate.py, for every model and round; the same command again continues.",
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("evaluation", metavar="EVALUATION", help="the output folder of jobs/evaluate.py")
    common.add_argument("--judge", required=True, metavar="MODEL", help="the judge's model name at its server")
    common.add_argument("--judge-url", required=True, metavar="URL", help="the server's base URL, e.g. http://127.0.0.1:8000/v1")
    common.add_argument(
        "--api-key-env", metavar="NAME", help="the environment variable with the API key (default: no key is sent)"
    )
    common.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: 8)")
    common.add_argument("--split", metavar="NAME", help="the split of the evaluation (default: the only one)")
    common.add_argument("--out", metavar="DIR", help="the output folder (default: EVALUATION/benchmarks/BENCHMARK-DIGEST)")

    alpaca_parser = benchmarks.add_parser("alpaca_eval", parents=[common], help="AlpacaEval 2, raw and length-controlled")
    alpaca_parser.add_argument(
        "--reference", required=True, metavar="FILE",
        help="the reference's outputs, a list of instruction, output, generator; or a datasets name",
    )  # fmt: skip
    alpaca_parser.add_argument(
        "--length-control", choices=alpaca.LENGTH_CONTROLS, default="v1",
        help="v1: as AlpacaEval 2; minimal: from lengths alone, for other instructions (default: v1)",
    )  # fmt: skip
    alpaca_parser.add_argument(
        "--gamed", metavar="FILE",
        help="difficulties: df_gamed.csv of the dataset tatsu-lab/alpaca_eval (default: from the hub), or a table of that form "
             "with a column `instruction`",
    )  # fmt: skip
    alpaca_parser.add_argument(
        "--top-logprobs", type=int, default=5, metavar="N",
        help="the number of tokens searched for the verdict (default: 5, as AlpacaEval)",
    )  # fmt: skip
    alpaca_parser.add_argument(
        "--judge-prompt", metavar="FILE",
        help="a ChatML template with {instruction}, {output_1}, {output_2} (default: AlpacaEval 2's own, from its package)",
    )  # fmt: skip

    arena_parser = benchmarks.add_parser("arena_hard", parents=[common], help="Arena-Hard v2")
    arena_parser.add_argument("--reference", required=True, metavar="FILE", help="the baseline's model_answer/NAME.jsonl")
    arena_parser.add_argument("--questions", metavar="FILE", help="question.jsonl (default: the file of the evaluation's split)")
    arena_parser.add_argument(
        "--category", metavar="NAME", help="judge this category alone; each category may have its own baseline"
    )
    arena_parser.add_argument("--temperature", type=float, default=0.0, help="temperature of the judge (default: 0)")
    arena_parser.add_argument("--max-tokens", type=int, default=16000, metavar="N", help="tokens of a judgment (default: 16000)")
    arena_parser.add_argument(
        "--judge-prompt", metavar="FILE", help="a TOML file with system and user (default: the prompt of this package)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code; a known error is one sentence, the last line on stderr."""
    args = parse(arguments)

    def command() -> int:
        judge = make_judge(args.judge, args.judge_url, args.api_key_env, args.concurrency)
        answers, source = read_evaluation(Path(args.evaluation), args.split)
        return (run_alpaca if args.benchmark == "alpaca_eval" else run_arena)(args, judge, answers, source)

    return run_command(command, shlex.join(["python", "jobs/benchmark.py", *arguments]))


def run_alpaca(args: argparse.Namespace, judge: Judge, answers: list[Answers], source: str) -> int:
    if not 2 <= args.top_logprobs <= 20:
        raise UserError(f"--top-logprobs {args.top_logprobs}: must be from 2 to 20, the limit of the OpenAI API")
    template = alpaca.find_template(args.judge_prompt)
    reference = alpaca.read_reference(args.reference)
    identity = [judge.model, sha256_file(Path(template)), args.top_logprobs, reference]
    folder = out_folder(args, answers, identity)
    with folder.locked():
        results = alpaca.run(answers, reference, judge, folder.root, say, template=template, top_logprobs=args.top_logprobs,
                             control=args.length_control, gamed=args.gamed)  # fmt: skip
        judge_settings = {"length_control": args.length_control, "top_logprobs": args.top_logprobs, "template": identity[1]}
        return finish(args, judge, folder, results, judge_settings)


def run_arena(args: argparse.Namespace, judge: Judge, answers: list[Answers], source: str) -> int:
    judge_prompt = arena_hard.load_judge_prompt(args.judge_prompt, args.temperature, args.max_tokens)
    questions = arena_hard.read_questions(args.questions or source, args.category)
    baseline = arena_hard.read_baseline(args.reference)
    identity = [judge.model, vars(judge_prompt), questions, baseline]
    folder = out_folder(args, answers, identity)
    with folder.locked():
        results = arena_hard.run(answers, questions, baseline, judge, judge_prompt, folder.root, say)
        judge_settings = {
            "temperature": judge_prompt.temperature,
            "max_tokens": judge_prompt.max_tokens,
            "prompt": digest([judge_prompt.system, judge_prompt.user]),
        }
        return finish(args, judge, folder, results, judge_settings)


def out_folder(args: argparse.Namespace, answers: list[Answers], identity: list) -> Run:
    """Returns the output folder: the same for the same answers, reference, judge and prompt."""
    inputs_digest = digest([args.benchmark, args.split, sorted({item.identity for item in answers}), identity])[:12]
    folder = Run(run_folder(args.out or f"{args.evaluation}/benchmarks/{args.benchmark}-{inputs_digest}"))
    models = ", ".join(dict.fromkeys(item.model for item in answers))
    say(f"{args.benchmark} of {models}, judged by {args.judge}, in {folder.root}")
    return folder


def finish(
    args: argparse.Namespace, judge: Judge, folder: Run, results: list[dict[str, Any]], judge_settings: dict[str, Any]
) -> int:
    """Writes benchmark.json, prints the table, and prints a hint if no verdict could be read."""
    report = {"benchmark": args.benchmark, "evaluation": str(Path(args.evaluation).resolve()), "reference": args.reference,
              "judge": {"model": judge.model, "url": judge.url, **judge_settings}, "results": results}  # fmt: skip
    data = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False).encode()
    write_atomic(folder.root / "benchmark.json", data)
    say("")
    say(text(report))
    if not any(row["n"] for row in results):
        advice = (
            "return log-probabilities with m or M among the top tokens"
            if args.benchmark == "alpaca_eval"
            else "end with a label like [[A>B]]"
        )
        say(f"\nno verdict could be read: the judge must {advice}; see --judge-prompt and the other judge options")
    say(f"\nfigures: {folder.root / 'benchmark.json'}")
    return 0


def text(report: dict[str, Any]) -> str:
    """Returns one line for each model and round (and category), for the terminal, and a sentence for each fault of a figure."""
    is_arena = report["benchmark"] == "arena_hard"
    header = ["model", "round"] + (["category", "win rate %", "contradictory", "tokens"] if is_arena else
              ["win rate %", "standard error", "length-controlled %", "standard error", "characters"])  # fmt: skip
    lines = []
    for row in report["results"]:
        rate = cell(row, row["win_rate"])
        if is_arena:
            cells = [row["category"], rate, str(row["num_contradictory"]), number(row["mean_tokens"])]
        else:
            controlled = row["no_length_control"] or number(row["length_controlled_win_rate"])
            cells = [rate, number(row["standard_error"], 2), controlled,
                     number(row["length_controlled_standard_error"], 2), number(row["mean_length"])]  # fmt: skip
        counts = [str(row[name]) for name in ("n", "num_unparsable", "num_missing")]
        lines.append([row["model"], f"y{row['round']}", *cells, *counts, row["baseline"]])
    shown = "\n".join(aligned([*header, "n", "unparsable", "missing", "against"], lines))
    return "\n".join([shown, *(f"\n{sentence}" for sentence in remarks(report["results"]))])


def cell(row: dict[str, Any], rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1f} [{row['low']:.1f}, {row['high']:.1f}]"


def remarks(results: list[dict[str, Any]]) -> list[str]:
    """Returns what a reader of the figures has to know."""
    faults = [(f"{row['model']} y{row['round']}", row.get("fit_warning")) for row in results]
    sentences = [f"length-controlled rate of {name}: {fault}" for name, fault in faults if fault]
    if any(row["n"] < MIN_PROMPTS for row in results):
        sentences.append(f"lines with n below {MIN_PROMPTS} rest on too few verdicts: conclude nothing from them")
    return sentences


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"
