"""AlpacaEval 2, computed by its own package `alpaca_eval`: raw and length-controlled win rates (arXiv 2404.04475).

This module writes outputs/NAME.json and reference.json in the package's model-output format, and annotators/JUDGE/configs.yaml.
With them the package's own command line judges the same files in the same way. The default template is the one that the
package ships for AlpacaEval 2.
"""

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evolve_ray.benchmarks.answers import Answers, file_name
from evolve_ray.benchmarks.difficulty import difficulties_from, difficulty_table
from evolve_ray.benchmarks.judge import RETRIES, TIMEOUT_S, Judge
from evolve_ray.data import read
from evolve_ray.errors import UserError, first_line
from evolve_ray.evaluate import intervals
from evolve_ray.store.files import sha256_file, write_atomic
from evolve_ray.store.rows import digest

OFFICIAL_TEMPLATE = "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
FOLDS = 5  # of the cross-validation in the length control

LENGTH_CONTROLLED = ("length_controlled_winrate", "lc_standard_error")  # figures of the package
# The model of the length control: v1 uses the fitted difficulty of AlpacaEval's instructions, minimal uses lengths alone.
LENGTH_CONTROLS = {"v1": "length_controlled_v1", "minimal": "length_controlled_minimal", "none": None}


def package() -> Any:
    """Returns the module `alpaca_eval`."""
    try:
        with quiet():
            import alpaca_eval
    except ImportError as error:
        raise UserError(f"alpaca_eval: the package is not installed ({error}); pip install -e '.[eval]'") from None
    return alpaca_eval


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the package: it logs every step, and a traceback for each verdict that it cannot parse.

    The figures count those verdicts.
    """
    level = logging.getLogger().level
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations in its dependencies, whose versions pyproject.toml limits
            yield
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger().setLevel(level)  # importing the package changes it


def read_reference(path: str) -> list[dict]:
    """Returns the reference outputs of a file or a `datasets` name (split "eval").

    Rows have instruction, output, generator, dataset and index, the position in the file; `difficulty.difficulty_table` gives
    them the index by which the package finds a difficulty.
    """
    errors: list[str] = []
    outputs: list[dict] = []
    for line, record in read.read_records(path, "eval", errors):
        where = f"{path}:{line}"
        row = {name: read.text_of(record, name, where, errors, empty=name == "output")
               for name in ("instruction", "output", "generator")}  # fmt: skip
        outputs.append({**row, "dataset": record.get("dataset", ""), "index": len(outputs)})
    if errors:
        raise read.faults_error(path, errors)
    names = {row["generator"] for row in outputs}
    if len(names) != 1:
        raise UserError(f"--reference {path}: must hold the outputs of one generator, but has {len(names)} generators")
    return outputs


def find_template(path: str | None) -> str:
    """Returns the judge's prompt template as an absolute path, after checking its format."""
    shipped = Path(package().__file__).parent / "evaluators_configs" / OFFICIAL_TEMPLATE
    file = Path(path).resolve() if path else shipped
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--judge-prompt {path}: cannot be read: {error}") from None
    text = text.strip()
    if not (text.startswith("<|im_start|>") and text.endswith("<|im_end|>")):
        raise UserError(f"--judge-prompt {path}: must be in ChatML, from <|im_start|> to <|im_end|>, which alpaca_eval expects")
    for name in ("instruction", "output_1", "output_2"):
        if text.count("{" + name + "}") != 1:
            raise UserError(f"--judge-prompt {path}: must have the field {{{name}}} exactly once")
    return str(file)


def write_annotator(root: Path, judge: Judge, template: str, top_logprobs: int) -> Path:
    """Writes and returns the annotator's folder: it judges as AlpacaEval 2 does, by the probabilities of the tokens `m` and `M`.

    alpaca_eval caches its verdicts in this folder and never requests one twice, so there is a folder for each judge, template
    and number of top log-probabilities.
    """
    config = {
        "prompt_template": template,
        "fn_completions": "openai_completions",
        "completions_kwargs": {
            "model_name": judge.model, "max_tokens": 1, "temperature": 1, "logprobs": True, "top_logprobs": top_logprobs,
            "requires_chatml": True,  # without it a model with "instruct" in its name gets a plain completion request
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


def win_rates(annotations: list[dict], *, control: str | None, weights: Path) -> dict[str, Any]:
    """Returns the package's figures in %, and the interval of the win rate. What cannot be computed is null, with a reason.

    `standard_error` is that of the mean verdict. `lc_standard_error` is the package's: how much the fitted model's predictions
    differ between instructions, without the uncertainty of the fit; null for `minimal`, which predicts the same for all of them.
    """
    import pandas
    from alpaca_eval import metrics

    frame = pandas.DataFrame(annotations)
    verdicts = [(value or 1.5) - 1.0 for value in frame["preference"].dropna()]  # 1 is lost, 2 won, 0 or 1.5 tied
    num_judged = len(verdicts)
    length_std = (frame["output_1"].str.len() - frame["output_2"].str.len()).std()
    figures: dict[str, Any] = dict.fromkeys((*LENGTH_CONTROLLED, "low", "high", "no_length_control", "fit_warning"))
    if verdicts:
        figures |= {end: 100 * value for end, value in intervals.mean(verdicts).items() if end != "mean"}
    if control is None:
        figures["no_length_control"] = "not asked for"
    elif num_judged < FOLDS:
        figures["no_length_control"] = f"needs {FOLDS} verdicts"
    elif not length_std > 0:
        figures["no_length_control"] = "the lengths differ nowhere"
    if not num_judged:  # the package cannot compute its figures without a verdict
        figures |= dict.fromkeys(("win_rate", "standard_error"), math.nan) | {"n_total": 0}
    elif figures["no_length_control"]:
        figures |= metrics.get_winrate(annotations)
    else:
        figures |= metrics.get_winrate(annotations) | fit(annotations, control, weights)
    return {**figures, "num_unparsable": len(frame) - num_judged}


def fit(annotations: list[dict], control: str | None, weights: Path) -> dict[str, Any]:
    """Returns the length-controlled figures of the package, and in words what went wrong: nothing of it is silenced."""
    from alpaca_eval.metrics import glm_winrate

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            figures = glm_winrate.get_length_controlled_winrate(
                annotations, glm_name=control, save_weights_dir=weights, is_warn_extreme_changes=False
            )
        except Exception as error:  # the fit goes through four packages, which raise many kinds
            return {"no_length_control": "the fit failed", "fit_warning": f"the fit failed: {first_line(error)}"}
    rate, raw = figures["length_controlled_winrate"], figures["win_rate"]
    if not math.isfinite(rate):
        return {"no_length_control": "the fit failed", "fit_warning": "the fit failed: its win rate is not a number"}
    faults = [str(warning.message).split("\n")[0] for warning in caught if warning.category.__name__ == "ConvergenceWarning"]
    if glm_winrate.get_is_extreme_changes(raw, rate):
        faults.append(f"{rate:.1f} % is far from the raw {raw:.1f} %, which may be a failure of the fit")
    spread = figures["lc_standard_error"]
    if control == LENGTH_CONTROLS["minimal"]:
        spread = None  # of predictions that cannot differ
    elif spread < 1e-9:
        faults.append("its model predicts the same for every instruction, so that its standard error says nothing")
    warning = "; ".join(dict.fromkeys(faults)) or None
    return {"length_controlled_winrate": rate, "lc_standard_error": spread, "fit_warning": warning}


def judge_answers(answers: Answers, reference: list[dict], judge: Judge, annotator: Path, control: str | None,
                  root: Path, say: Callable[[str], None]) -> dict[str, Any]:  # fmt: skip
    """Writes the outputs of one model and lets alpaca_eval judge them; returns its row of the leaderboard."""
    import openai

    references = [row for row in reference if row["instruction"] in answers.drafts]
    outputs = [
        {"instruction": row["instruction"], "output": answers.drafts[row["instruction"]]["text"], "generator": answers.name,
         "dataset": row["dataset"]}
        for row in references
    ]  # fmt: skip
    write_json(root / "outputs" / f"{answers.name}.json", outputs)
    say(f"  {answers.name}: {len(outputs)} instructions")
    alpaca_eval = package()
    try:
        with quiet():
            leaderboard, _ = alpaca_eval.evaluate(
                model_outputs=outputs,
                reference_outputs=references,
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
                    "is_ordered": True,  # the reference may have the same instruction twice
                    "num_procs": judge.concurrency,
                    "openai_api_keys": [judge.key],
                    "openai_api_base": judge.url,
                    "openai_organization_ids": [None],
                    "client_config_path": root / "none",  # without it a file in the user's home could set another server
                    "client_kwargs": {"max_retries": RETRIES, "timeout": TIMEOUT_S},
                    "n_retries": 1000,  # after the last retry the package would count a busy judge's missing reply as a verdict
                },
            )
    except openai.OpenAIError as error:
        judge.fail(error)
    return {name: json_value(value) for name, value in leaderboard.loc[answers.name].to_dict().items()}


def json_value(value: Any) -> Any:
    """Returns a value of the leaderboard as JSON can store it; NaN becomes null."""
    if value is None or isinstance(value, str):
        return value
    return None if value != value else value.item() if hasattr(value, "item") else value


def write_json(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(rows, indent=1, ensure_ascii=False).encode())


def run(all_answers: list[Answers], reference: list[dict], judge: Judge, root: Path, say: Callable[[str], None], *,
        template: str, top_logprobs: int, control: str, gamed: str | None) -> list[dict[str, Any]]:  # fmt: skip
    """Judges every model and round against the reference; returns one dict of figures for each of them."""
    baseline = reference[0]["generator"]
    if baseline in {answers.name for answers in all_answers}:
        raise UserError(f"--reference: its generator has the name of an evaluated model, {baseline}; rename it in the file")
    texts = {row["instruction"] for row in reference}
    if not any(prompt in texts for prompt in all_answers[0].drafts):
        raise UserError(
            "--reference: has none of the evaluation's prompts; give the reference outputs for the instructions that were "
            "evaluated"
        )
    table, reference = difficulty_table(control, gamed, reference, all_answers[0].asked, root, say)
    write_json(root / "reference.json", reference)
    annotator = write_annotator(root, judge, template, top_logprobs)
    results = []
    with difficulties_from(table):
        for answers in all_answers:
            row = judge_answers(answers, reference, judge, annotator, LENGTH_CONTROLS[control], root, say)
            n = int(row["n_total"])
            results.append({
                "model": answers.model, "round": answers.round, "name": answers.name, "baseline": baseline,
                "win_rate": row["win_rate"], "low": row["low"], "high": row["high"], "standard_error": row["standard_error"],
                "length_controlled_win_rate": row["length_controlled_winrate"],
                "length_controlled_standard_error": row["lc_standard_error"], "no_length_control": row["no_length_control"],
                "fit_warning": row["fit_warning"],
                "mean_length": row["avg_length"], "n": n, "num_unparsable": int(row["num_unparsable"]),
                "num_missing": len(reference) - n - int(row["num_unparsable"]), "annotator": annotator.name,
            })  # fmt: skip
    return results
