"""AlpacaEval 2 by the code of its own package `alpaca_eval`: raw and length-controlled win rates (arXiv 2404.04475).

Written are outputs/NAME.json and reference.json in its model-output format, and annotators/JUDGE/configs.yaml, with which
its own command line judges the same files the same way. The default template is the one that the package ships for AlpacaEval 2.
"""

import contextlib
import csv
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evolve_ray.benchmarks.answers import Answers, file_name
from evolve_ray.benchmarks.judge import RETRIES, TIMEOUT_S, Judge
from evolve_ray.data import read
from evolve_ray.errors import UserError, first_line
from evolve_ray.store.files import sha256_file, write_atomic
from evolve_ray.store.rows import digest

OFFICIAL_TEMPLATE = "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
OFFICIAL_SIZE = 805  # instructions, whose difficulty the hub's df_gamed.csv has
FOLDS = 5  # of the cross-validation inside the length control

# How the length-controlled win rate is made: with the fitted difficulty of AlpacaEval's instructions, or from lengths alone.
LENGTH_CONTROLS = {"v1": "length_controlled_v1", "minimal": "length_controlled_minimal", "none": None}


def package() -> Any:
    """The module `alpaca_eval`."""
    try:
        with quiet():
            import alpaca_eval
    except ImportError as error:
        raise UserError(f"alpaca_eval: the package is missing ({error}); pip install -e '.[eval]'") from None
    return alpaca_eval


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The package logs at every step, and each verdict that it cannot read with a traceback; figures say how many there were."""
    level = logging.getLogger().level
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what later versions of its dependencies will change; pyproject.toml bounds them
            yield
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger().setLevel(level)  # the package sets it when imported


def read_reference(path: str) -> list[dict]:
    """The reference's outputs, from a file or a `datasets` name (split "eval"): instruction, output, generator, dataset, index.

    `index` is the place in the file: AlpacaEval knows an instruction's difficulty by it.
    """
    faults: list[str] = []
    found: list[dict] = []
    for line, record in read.read_records(path, "eval", faults):
        where = f"{path}:{line}"
        row = {name: read.text_of(record, name, where, faults, empty=name == "output")
               for name in ("instruction", "output", "generator")}  # fmt: skip
        found.append({**row, "dataset": record.get("dataset", ""), "index": len(found)})
    if faults:
        raise read.faults_error(path, faults)
    names = {row["generator"] for row in found}
    if len(names) != 1:
        raise UserError(f"--reference {path}: must hold the outputs of one generator, but has {len(names)}")
    return found


def template_of(path: str | None) -> str:
    """The judge's prompt as a path that alpaca_eval finds wherever it runs."""
    shipped = Path(package().__file__).parent / "evaluators_configs" / OFFICIAL_TEMPLATE
    file = Path(path).resolve() if path else shipped
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--judge-prompt {path}: cannot be read: {error}") from None
    text = text.strip()
    if not (text.startswith("<|im_start|>") and text.endswith("<|im_end|>")):
        raise UserError(f"--judge-prompt {path}: must be in ChatML, from <|im_start|> to <|im_end|>, as alpaca_eval reads it")
    for name in ("instruction", "output_1", "output_2"):
        if text.count("{" + name + "}") != 1:
            raise UserError(f"--judge-prompt {path}: must have the field {{{name}}} once")
    return str(file)


def write_annotator(root: Path, judge: Judge, template: str, top_logprobs: int) -> Path:
    """The annotator's folder: AlpacaEval 2's way of judging, by the probabilities of the tokens `m` and `M`.

    alpaca_eval keeps its verdicts there and never asks for one twice, so a folder belongs to one judge, template and count.
    """
    config = {
        "prompt_template": template,
        "fn_completions": "openai_completions",
        "completions_kwargs": {
            "model_name": judge.model, "max_tokens": 1, "temperature": 1, "logprobs": True, "top_logprobs": top_logprobs,
            "requires_chatml": True,  # else a model with "instruct" in its name is asked as a plain completion
        },
        "fn_completion_parser": "logprob_parser",
        "completion_parser_kwargs": {"numerator_token": "m", "denominator_tokens": ["m", "M"], "is_binarize": False},
        "completion_key": "completions_all",
        "batch_size": 1,
    }  # fmt: skip
    name = f"{file_name(judge.model)}-{digest([judge.model, sha256_file(Path(template)), top_logprobs])[:8]}"
    folder = root / "annotators" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "configs.yaml", json.dumps({name: config}, indent=1).encode())  # JSON is YAML
    return folder


def difficulty_table(control: str, gamed: str | None, reference: list[dict], root: Path) -> Path | None:
    """The table from which the length control takes difficulties: given, from the hub, or with none for `minimal`.

    It is found before the judge is asked, because verdicts cost money.
    """
    if control == "none":
        return None
    if control == "minimal":  # its formula reads no difficulty, but the package looks one up for every instruction
        path = root / "no-difficulty.csv"
        lines = ["model,index,instruction_difficulty", *(f"none,{row['index']},0.0" for row in reference)]
        write_atomic(path, ("\n".join(lines) + "\n").encode())
        return path
    if gamed:
        return check_table(Path(gamed), len(reference))
    if len(reference) != OFFICIAL_SIZE:
        raise UserError(
            f"--length-control v1: needs the difficulty of every instruction, which is known for AlpacaEval's {OFFICIAL_SIZE}, "
            f"but the reference has {len(reference)}; give --length-control minimal, or the difficulties with --gamed FILE"
        )
    import huggingface_hub

    try:
        found = huggingface_hub.hf_hub_download("tatsu-lab/alpaca_eval", "df_gamed.csv", repo_type="dataset")
    except Exception as error:  # a dozen kinds, all of them about this file
        raise UserError(
            f"--gamed: is missing, and df_gamed.csv of the dataset tatsu-lab/alpaca_eval cannot be had: {first_line(error)}; "
            "give that file with --gamed, or --length-control minimal"
        ) from None
    return check_table(Path(found), len(reference))


def check_table(path: Path, size: int) -> Path:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            places = list(dict.fromkeys(row["index"] for row in csv.DictReader(file)))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--gamed {path}: is no table with a column index: {error}") from None
    if places[:size] != [str(place) for place in range(size)]:
        raise UserError(f"--gamed {path}: must begin with the instructions 0 to {size - 1} of the reference, in its order")
    return path


@contextlib.contextmanager
def difficulties_from(table: Path | None) -> Iterator[None]:
    """The package downloads its table of difficulties at every call; this gives it the file that we have."""
    from alpaca_eval.metrics import glm_winrate

    theirs = glm_winrate.hf_hub_download
    glm_winrate.hf_hub_download = lambda **_: str(table)
    try:
        yield
    finally:
        glm_winrate.hf_hub_download = theirs


def win_rates(annotations: list[dict], *, control: str | None, weights: Path) -> dict[str, Any]:
    """The package's figures in %; the length-controlled ones are null with a reason where they cannot be made."""
    import pandas
    from alpaca_eval import metrics

    frame = pandas.DataFrame(annotations)
    judged = int(frame["preference"].notna().sum())
    apart = (frame["output_1"].str.len() - frame["output_2"].str.len()).std()
    figures: dict[str, Any] = {"length_controlled_winrate": None, "lc_standard_error": None, "no_length_control": None}
    if control is None:
        figures["no_length_control"] = "not asked for"
    elif judged < FOLDS:
        figures["no_length_control"] = f"needs {FOLDS} verdicts"
    elif not apart > 0:
        figures["no_length_control"] = "the lengths differ nowhere"
    if not judged:  # the package's own figures need a verdict
        figures |= dict.fromkeys(("win_rate", "standard_error"), math.nan) | {"n_total": 0}
    elif figures["no_length_control"]:
        figures |= metrics.get_winrate(annotations)
    else:
        figures |= metrics.get_length_controlled_winrate(
            annotations, glm_name=control, save_weights_dir=weights, is_warn_extreme_changes=False
        )
    return {**figures, "num_unparsable": len(frame) - judged}


def judge_answers(answers: Answers, reference: list[dict], judge: Judge, annotator: Path, control: str | None,
                  root: Path, say: Callable[[str], None]) -> dict[str, Any]:  # fmt: skip
    """Writes one model's outputs, lets alpaca_eval judge and count them; its leaderboard row is the result."""
    import openai

    asked = [row for row in reference if row["instruction"] in answers.drafts]
    outputs = [
        {"instruction": row["instruction"], "output": answers.drafts[row["instruction"]]["text"], "generator": answers.name,
         "dataset": row["dataset"]}
        for row in asked
    ]  # fmt: skip
    write_json(root / "outputs" / f"{answers.name}.json", outputs)
    say(f"  {answers.name}: {len(outputs)} instructions")
    alpaca_eval = package()
    try:
        with quiet():
            leaderboard, _ = alpaca_eval.evaluate(
                model_outputs=outputs,
                reference_outputs=asked,
                annotators_config=annotator,
                name=answers.name,
                output_path=root / "results" / answers.name,
                precomputed_leaderboard=None,
                is_cache_leaderboard=False,
                is_return_instead_of_print=True,
                fn_metric=win_rates,
                metric_kwargs={"control": control, "weights": root / "weights" / annotator.name},
                sort_by="win_rate",
                annotation_kwargs={
                    "is_ordered": True,  # the same instruction may stand in the reference twice
                    "num_procs": judge.concurrency,
                    "openai_api_keys": [judge.key],
                    "openai_api_base": judge.url,
                    "openai_organization_ids": [None],
                    "client_config_path": root / "none",  # else a file in the user's home could name another server
                    "client_kwargs": {"max_retries": RETRIES, "timeout": TIMEOUT_S},
                    "n_retries": 1000,  # at its end the package would take a busy judge's silence for a verdict
                },
            )
    except openai.OpenAIError as error:
        judge.fail(error)
    return {name: plain(value) for name, value in leaderboard.loc[answers.name].to_dict().items()}


def plain(value: Any) -> Any:
    """A number of the leaderboard as JSON has it: null where there is none."""
    if value is None or isinstance(value, str):
        return value
    return None if value != value else value.item() if hasattr(value, "item") else value


def write_json(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(rows, indent=1, ensure_ascii=False).encode())


def run(all_answers: list[Answers], reference: list[dict], judge: Judge, root: Path, say: Callable[[str], None], *,
        template: str, top_logprobs: int, control: str, gamed: str | None) -> list[dict[str, Any]]:  # fmt: skip
    """Judges every model and round against the reference; one dict of figures for each of them."""
    baseline = reference[0]["generator"]
    if baseline in {answers.name for answers in all_answers}:
        raise UserError(f"--reference: its generator is called {baseline} as an evaluated one is; rename it in the file")
    texts = {row["instruction"] for row in reference}
    if not any(prompt in texts for prompt in all_answers[0].drafts):
        raise UserError(
            "--reference: has none of the evaluation's prompts; give the reference outputs of the instructions that the "
            "evaluation was made with"
        )
    table = difficulty_table(control, gamed, reference, root)
    write_json(root / "reference.json", reference)
    annotator = write_annotator(root, judge, template, top_logprobs)
    results = []
    with difficulties_from(table):
        for answers in all_answers:
            row = judge_answers(answers, reference, judge, annotator, LENGTH_CONTROLS[control], root, say)
            n = int(row["n_total"])
            results.append({
                "model": answers.model, "round": answers.round, "name": answers.name, "baseline": baseline,
                "win_rate": row["win_rate"], "standard_error": row["standard_error"],
                "length_controlled_win_rate": row["length_controlled_winrate"],
                "length_controlled_standard_error": row["lc_standard_error"], "no_length_control": row["no_length_control"],
                "mean_length": row["avg_length"], "n": n, "num_unparsable": int(row["num_unparsable"]),
                "num_missing": len(reference) - n - int(row["num_unparsable"]), "annotator": annotator.name,
            })  # fmt: skip
    return results
