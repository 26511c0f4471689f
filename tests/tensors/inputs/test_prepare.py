"""Everything that a run starts from is checked before Ray starts, and committed once."""

import json
import shutil

import pytest

from evolve_ray.config.load import load
from evolve_ray.config.resolve import resolved
from evolve_ray.driver import main
from evolve_ray.errors import EvolveError, UserError
from evolve_ray.inputs import prepare as inputs
from evolve_ray.inputs.prompts import Prompter
from evolve_ray.store import rows
from evolve_ray.store.run import Run


@pytest.fixture
def settle(recipe, tmp_path):
    """Settles the small recipe with overrides in one run directory."""

    def settle(*overrides, rerun_changed=False):
        tmp_path.joinpath("run").mkdir(exist_ok=True)
        inputs.settle_config(load(recipe(), overrides), Run(tmp_path / "run"), rerun_changed=rerun_changed)
        return json.loads((tmp_path / "run" / "config.json").read_text())

    return settle


def test_resolved_configuration_is_stored_whole(settle, recipe):
    assert settle("training.beta=0.5") == resolved(load(recipe(), ["training.beta=0.5"]))


def test_same_configuration_is_accepted_again(settle):
    assert settle("engine.args.a=1") == settle("engine.args.a=1")


def test_changed_option_is_refused_with_both_values(settle):
    settle()
    with pytest.raises(UserError, match=r"changed: seed \(0 -> 1\), training\.beta \(0\.1 -> 0\.2\); use another --run"):
        settle("training.beta=0.2", "seed=1")


@pytest.mark.parametrize(("before", "after"), [((), ("engine.args.a=1",)), (("engine.args.a=1",), ())])
def test_option_of_a_free_table_that_came_or_went_is_refused(settle, before, after):
    settle(*before)
    with pytest.raises(UserError, match=r"engine\.args"):
        settle(*after)


def test_runtime_options_may_change_and_are_stored(settle):
    settle()
    assert settle("engine.actors=4", "iterations=9")["engine"]["actors"] == 4


def test_changed_option_is_accepted_when_asked_for(settle):
    settle()
    assert settle("seed=3", rerun_changed=True)["seed"] == 3
    assert settle("seed=3")["seed"] == 3


def test_damaged_stored_configuration_is_named(settle, tmp_path):
    settle()
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(EvolveError, match=r"config\.json"):
        settle()


@pytest.fixture
def prepare(recipe, tmp_path, tiny_model):
    """Prepares a run of the tiny model on prompts that are written to a file first; Ray must not start."""

    def prepare(texts, *overrides, held=(), rerun_changed=False):
        for name, given in (("prompts", texts), ("held", held)):
            lines = [json.dumps({"prompt": text}) + "\n" for text in given]
            (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        fixed = [
            f"model.path={tiny_model}", "model.context_tokens=60", "sampling.max_tokens=10", "template.name=tiny",
            f"prompts.path={tmp_path}/prompts.jsonl", "prompts.per_iteration=2", "iterations=2",
            f"scorer.name={__name__}:Zero",
        ]  # fmt: skip
        splits = [f"evaluation.splits.held={tmp_path}/held.jsonl"] if held else []
        config = load(recipe(), [*fixed, *splits, *overrides])
        run = Run(tmp_path / "run")
        run.root.mkdir(exist_ok=True)
        return inputs.prepare(config, run, lambda _: None, no_ray, rerun_changed=rerun_changed)

    return prepare


class Zero:
    """Scores everything with zero."""

    def __call__(self, prompts, answers, responses):
        return [0.0] * len(responses)


def no_ray():
    raise AssertionError("Ray was started while inputs were still being checked")


TEXTS = ["one", "two", "three", "four", "five"]


def committed(context, number):
    return rows.read_table(context.prompts[number].path("prompts.parquet"))


def rejected(context, number):
    return [(row["line"], row["reason"]) for row in rows.read_jsonl(context.prompts[number].path("rejected.jsonl"))]


def test_each_iteration_gets_its_own_prompts_with_their_tokens(prepare):
    context = prepare(TEXTS)
    table = committed(context, 1) + committed(context, 2)
    assert len({row["prompt"] for row in table}) == 4
    assert all(row["num_tokens"] == len(row["prompt"]) + 3 for row in table)  # user, end and assistant tokens


def test_what_is_prepared_is_not_made_again(prepare, tmp_path):
    prepare(TEXTS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/iteration-*/**/*")}
    prepare(TEXTS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/iteration-*/**/*")} == before
    assert before


def test_changed_prompts_are_refused_and_put_aside_when_asked_for(prepare, tmp_path):
    prepare(TEXTS)
    with pytest.raises(UserError, match=r"iteration-01/prompts: was made from other inputs"):
        prepare([*TEXTS, "six"])
    prepare([*TEXTS, "six"], rerun_changed=True)
    assert len(list(tmp_path.glob("run/iteration-01/.superseded-prompts-*"))) == 1


def test_too_few_prompts_are_refused_with_the_counts(prepare):
    with pytest.raises(UserError, match="2 iterations of 2 fresh prompts need 4, but 3 are usable"):
        prepare(TEXTS[:3])


def test_prompts_come_again_where_the_recipe_says_so_and_held_out_ones_never(prepare):
    context = prepare(TEXTS[:4], "prompts.again=when_used_up", "iterations=4", held=["two"])
    tables = [committed(context, number) for number in (1, 2, 3, 4)]
    texts = [{row["prompt"] for row in table} for table in tables]
    assert [len(part) for part in texts] == [2, 2, 2, 2]
    assert set.union(*texts) == {"one", "three", "four"}
    assert len({row["prompt_id"] for table in tables for row in table}) == 3, "ids stay the same"


def test_more_prompts_in_an_iteration_than_there_are_is_refused_also_where_they_come_again(prepare):
    with pytest.raises(UserError, match=r"an iteration has 2 different prompts, but 1 are usable; lower prompts\.per_iteration"):
        prepare(TEXTS[:1], "prompts.again=when_used_up")


def test_prompt_beyond_the_context_stops_the_run_with_file_line_and_tokens(prepare, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare([*TEXTS, "x" * 50])
    said = str(caught.value)
    assert "1 of 6 prompts are too long" in said
    assert f"{tmp_path}/prompts.jsonl:6: prompt has 53 tokens, limit 30 (model.context_tokens - the responses in view * " in said


def test_prompt_beyond_the_context_is_rejected_with_its_reason_where_the_loss_is_allowed(prepare):
    context = prepare([*TEXTS, "x" * 50], "prompts.max_rejected_fraction=0.2")
    ((line, reason),) = rejected(context, 1)
    assert (line, reason.split(" (")[0]) == (6, "prompt has 53 tokens, limit 30")


def test_longest_prompt_that_fits_leaves_room_for_its_refinement(prepare):
    context = prepare([*TEXTS[:3], "x" * 27])
    chat = Prompter(context, {}).reader.chat
    longest = max((row for number in (1, 2) for row in committed(context, number)), key=lambda row: row["num_tokens"])
    assert longest["num_tokens"] == 30
    ask = chat.context_ids(context.template.refinement(longest["prompt"], "y" * 10))
    assert len(ask) + 10 <= context.config.model.context_tokens


def test_held_out_prompt_is_not_trained_on_and_is_counted(prepare):
    context = prepare(TEXTS, held=["three", "other"])
    assert "three" not in {row["prompt"] for number in (1, 2) for row in committed(context, number)}
    assert rejected(context, 1) == [(3, "is also a prompt of evaluation split 'held'")]


@pytest.fixture
def asks_alike(tiny_model, tmp_path):
    """The tiny model with a template that trims and lowers its messages and a tokenizer that composes Unicode."""
    folder = tmp_path / "alike"
    shutil.copytree(tiny_model, folder)
    template = folder / "chat_template.jinja"
    written = template.read_text()
    template.write_text(written.replace("message.content", "(message.content | trim | lower)"))
    assert template.read_text() != written
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return f"model.path={folder}"


def test_prompt_that_asks_the_model_the_same_as_a_held_out_one_is_not_trained_on(prepare, asks_alike, triples):
    disguised = ["What is 2+2? ", "\uff37hat is 2+2?", "What is \uff12+2?", "one"]
    given = triples("activation", *disguised)
    context = prepare([*disguised, *TEXTS[1:]], asks_alike, given, held=["What is 2+2?", "other"])
    trained = {row["prompt"] for number in (1, 2) for row in committed(context, number)}
    assert trained <= set(TEXTS)
    assert rejected(context, 1) == [(line, "is also a prompt of evaluation split 'held'") for line in (1, 2, 3)]
    assert [row["prompt"] for row in rows.read_table(context.triples["activation"].path("pairs.parquet"))] == ["one"]


def test_prompt_that_asks_the_model_the_same_as_an_earlier_one_counts_once(prepare, asks_alike):
    context = prepare(["\uff54wo", *TEXTS, "three "], asks_alike, held=["held", "\uff48eld ", "other"])
    assert {row["prompt"] for number in (1, 2) for row in committed(context, number)} <= {
        "\uff54wo",
        "one",
        "three",
        "four",
        "five",
    }
    assert rejected(context, 1) == [(3, "asks the model the same as line 1"), (7, "asks the model the same as line 4")]
    assert [row["prompt"] for row in rows.read_table(context.held_out.path("prompts.parquet"))] == ["held", "other"]
    assert context.held_out.stats["num_rejected"] == 1


@pytest.fixture
def triples(tmp_path):
    """Writes preference triples on the given prompts, and says how a recipe names them."""

    def write(name, *texts):
        lines = [json.dumps({"prompt": text, "chosen": "good", "rejected": f"bad {place}"}) for place, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return f"{name}.path={tmp_path}/{name}.jsonl"

    return write


@pytest.mark.parametrize("name", ["activation", "offline"])
def test_given_triples_on_a_held_out_prompt_are_not_trained_on_and_are_counted(prepare, triples, tmp_path, name):
    context = prepare(TEXTS, triples(name, "three", "mine", "three", "other", "mine"), held=["three", "other"])
    given = context.triples[name]
    assert [row["prompt"] for row in rows.read_table(given.path("pairs.parquet"))] == ["mine", "mine"]
    lost = rows.read_jsonl(given.path("rejected.jsonl"))
    reason = "is on a prompt of evaluation split 'held'"
    assert [(row["file"], row["line"], row["reason"]) for row in lost] == [
        (f"{tmp_path}/{name}.jsonl", line, reason) for line in (1, 3, 4)
    ]
    assert [given.stats[count] for count in ("num_in", "num_rows", "num_rejected")] == [5, 2, 3]
    assert given.inputs == {"held_out": context.held_out.identity}


def test_triples_are_read_again_when_the_held_out_prompts_change(prepare, triples):
    given = triples("activation", "three", "mine")
    prepare(TEXTS, given, held=["other"])
    with pytest.raises(UserError, match=r"iteration-00/held_out: was made from other inputs"):
        prepare(TEXTS, given, held=["other", "three"])
    context = prepare(TEXTS, given, held=["other", "three"], rerun_changed=True)
    assert context.triples["activation"].stats["num_rows"] == 1


def test_triples_without_an_evaluation_prompt_among_them_are_the_same_pairs_with_and_without_splits(prepare, triples, tmp_path):
    given = triples("offline", "mine", "yours")
    alone = prepare(TEXTS, given).triples["offline"]
    shutil.move(tmp_path / "run", tmp_path / "before")
    beside = prepare(TEXTS, given, held=["other"]).triples["offline"]
    before = tmp_path / "before/iteration-00/offline_pairs/pairs.parquet"
    assert before.read_bytes() == beside.path("pairs.parquet").read_bytes()
    assert alone.inputs == {}


def test_triples_that_are_all_on_held_out_prompts_are_refused(prepare, triples):
    said = r"offline\.jsonl: none of 2 preference triples can be used: is on a prompt of evaluation split 'held' \(2\)"
    with pytest.raises(UserError, match=said):
        prepare(TEXTS, triples("offline", "three", "other"), held=["three", "other"])


def test_triples_are_not_committed_where_the_held_out_prompts_are_not_known(prepare, triples, tmp_path):
    with pytest.raises(UserError, match=r"held\.jsonl:2: column 'prompt' is empty"):
        prepare(TEXTS, triples("activation", "mine"), held=["ok", ""])
    assert not (tmp_path / "run/iteration-00/activation_pairs").exists()


def test_same_text_in_two_splits_stays_two_prompts(prepare, tmp_path):
    (tmp_path / "again.jsonl").write_text('{"prompt": "other"}\n')
    context = prepare(TEXTS, f"evaluation.splits.again={tmp_path}/again.jsonl", held=["other"])
    table = rows.read_table(context.held_out.path("prompts.parquet"))
    assert {row["split"] for row in table} == {"held", "again"}
    assert len({row["prompt_id"] for row in table}) == 2


@pytest.mark.parametrize(
    "option", ["strategy.name", "engine.name", "scorer.name", "selection.name", "training.objective"]
)  # fmt: skip
def test_plug_that_does_not_exist_is_refused_by_its_option(prepare, option):
    with pytest.raises(UserError, match=rf"{option}: 'none:Such' cannot be loaded"):
        prepare(TEXTS, f"{option}=none:Such")


def test_rejected_rows_of_an_iteration_are_collected_in_the_order_of_the_data(prepare):
    context = prepare([*TEXTS, "one"])
    folder = context.run.iteration(1)
    for name in ("pairs", "generations"):
        (folder / name).mkdir()
        (folder / name / "rejected.jsonl").write_text(json.dumps({"stage": name}) + "\n")
    context.collect_rejected(1)
    assert [row["stage"] for row in rows.read_jsonl(folder / "rejected.jsonl")] == ["prompts", "generations", "pairs"]


def test_verifier_that_cannot_be_made_is_refused_before_anything_starts(recipe):
    answers = ["prompts.answer_column=a", "verifier.name=regex", "verifier.pattern='(['"]
    with pytest.raises(UserError, match=r"verifier\.pattern: .*is not a regular expression"):
        inputs.check_plugs(load(recipe(), answers))


def test_adapters_without_their_package_are_refused_before_anything_starts(recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trainer\.lora_rank: needs the package peft; pip install -e '\.\[lora\]'"):
        inputs.check_plugs(load(recipe(), ["trainer.lora_rank=8"]))


def test_faults_of_all_files_are_told_at_once(prepare, tmp_path):
    triples = tmp_path / "triples.jsonl"
    triples.write_text('{"prompt": "p"}\n')
    with pytest.raises(UserError) as caught:
        prepare(["one", "", "three"], f"activation.path={triples}", held=["ok", ""])
    told = str(caught.value)
    for line in ("held.jsonl:2: column 'prompt' is empty", "triples.jsonl:1: has no column 'chosen'", "prompts.jsonl:2: column"):
        assert line in told
    assert not (tmp_path / "run/iteration-01/prompts").exists(), "prompts were chosen without the held-out ones"


@pytest.fixture
def without_template(tiny_model, tmp_path):
    """A copy of the tiny model whose tokenizer has no chat template; as a reward model, if asked."""

    def make(**config):
        folder = tmp_path / "without"
        shutil.copytree(tiny_model, folder)
        (folder / "chat_template.jinja").unlink()
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
        return folder

    return make


def test_policy_without_a_chat_template_is_refused_before_anything_starts(prepare, without_template):
    folder = without_template()
    with pytest.raises(UserError) as caught:
        prepare(TEXTS, f"model.path={folder}")
    assert str(caught.value).startswith(f"model.path: {folder}: its tokenizer has no chat template; set model.chat_template")


@pytest.mark.parametrize("field", ["scorer.model", "scorer.members"])
def test_reward_model_without_a_chat_template_is_refused_before_anything_starts(prepare, without_template, field):
    folder = without_template(architectures=["LlamaForSequenceClassification"], id2label={"0": "score"})
    alone = ["scorer.name=reward_model", f"scorer.model={folder}"]
    several = ["scorer.name=mean", f"scorer.members=['reward_model={folder}', '{__name__}:Zero']", "scorer.model=''"]
    with pytest.raises(UserError) as caught:
        prepare(TEXTS, *(alone if field == "scorer.model" else several))
    assert str(caught.value).startswith(f"{field}: {folder}: its tokenizer has no chat template; add chat_template.jinja")


def test_model_that_is_no_reward_model_is_refused_by_the_option_that_names_it(prepare, tiny_model):
    with pytest.raises(UserError, match=r"^scorer\.members: .*is not a sequence classifier"):
        prepare(TEXTS, "scorer.name=mean", f"scorer.members=['reward_model={tiny_model}', '{__name__}:Zero']", "scorer.model=''")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"prompt": "two"', "is not a JSON object: Expecting ',' delimiter"),
        (b'{"text": "two"}', "has no column 'prompt'; its columns are: text"),
        (b'{"prompt": "\xff"}', "is not UTF-8 at byte 12 of the line"),
        (b'{"prompt": NaN}', "is not a JSON object: NaN is not a JSON number"),
        (b'{"prompt": "a", "prompt": "b"}', "is not a JSON object: an object has the same key twice"),
        (b'{"prompt": "\\ud800"}', "column 'prompt' contains half of a surrogate pair"),
    ],
    ids=["broken", "missing key", "no UTF-8", "NaN", "key twice", "lone surrogate"],
)
def test_faulty_row_ends_the_command_with_exit_code_two_and_one_sentence(recipe, tmp_path, tiny_model, capsys, line, fault):
    (tmp_path / "prompts.jsonl").write_bytes(b'{"prompt": "one"}\n' + line + b'\n{"prompt": "three"}\n')
    given = [
        f"model.path={tiny_model}", "model.context_tokens=60", "sampling.max_tokens=10", "template.name=tiny",
        f"prompts.path={tmp_path}/prompts.jsonl", "prompts.per_iteration=1", f"scorer.name={__name__}:Zero",
    ]  # fmt: skip
    assert main([str(recipe()), "--run", str(tmp_path / "run"), *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/prompts.jsonl: 1 unusable row: {tmp_path}/prompts.jsonl:2: {fault}"), said
    assert said.count("\n") == 1
    assert not (tmp_path / "run/iteration-01/prompts").exists()


def test_tokenizer_that_does_not_fit_the_model_is_refused_before_anything_starts(prepare, tiny_model, tmp_path):
    folder = tmp_path / "small-vocabulary"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 10}))
    with pytest.raises(UserError, match=r"^model\.path: .*weight has shape \[101, 16\] in the weight files and \[10, 16\] by"):
        prepare(TEXTS, f"model.path={folder}")


def test_gold_answers_that_the_verifier_cannot_check_are_refused_with_those_of_all_files_at_once(prepare, tmp_path):
    def write(name, *answers):
        rows_ = [json.dumps({"prompt": f"{name} {number}", "gold": answer}) for number, answer in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows_))
        return f"{tmp_path}/{name}.jsonl"

    training, held = write("sums", "4", "(1,2)", "5", "6", "7", "3 to 5"), write("test", "10:30", "9")
    options = [
        "verifier.name=numeric", f"prompts.path={training}", "prompts.answer_column=gold", f"evaluation.splits.held={held}",
        "evaluation.answer_column=gold",
    ]  # fmt: skip
    with pytest.raises(UserError) as caught:
        prepare(TEXTS, *options)
    said = str(caught.value)
    assert f"{held}: 1 unusable row: {held}:1: gold answer '10:30' is not one number, as verifier.name 'numeric' needs it" in said
    assert f"{training}: 2 unusable rows: {training}:2: gold answer '(1,2)' is not one number" in said
    assert f"{training}:6: gold answer '3 to 5' is not one number" in said
    assert prepare(TEXTS, *options, "verifier.name=exact").prompts


def test_given_drafts_and_further_columns_are_in_the_tables_only_where_the_recipe_names_them(prepare, tmp_path):
    for name, texts in (("mine", "abcd"), ("held_mine", "xy")):
        lines = [{"prompt": text, "draft": f"draft of {text}", "hint": text * 2, "level": 3} for text in texts]
        rows.write_jsonl(tmp_path / f"{name}.jsonl", lines)
    named = [f"prompts.path={tmp_path}/mine.jsonl", "prompts.draft_column=draft", "prompts.columns=['hint', 'level']"]
    named += [f"evaluation.splits.h={tmp_path}/held_mine.jsonl", "evaluation.columns=['hint']"]
    context = prepare("abcd", *named)
    for number in (1, 2):
        table = rows.read_table(context.prompts[number].path("prompts.parquet"))
        assert len(table) == 2
        for row in table:
            assert row["draft"] == f"draft of {row['prompt']}"
            assert json.loads(row["columns"]) == {"hint": row["prompt"] * 2, "level": 3}
    held = rows.read_table(context.held_out.path("prompts.parquet"))
    assert [(json.loads(row["columns"]), "draft" in row) for row in held] == [({"hint": "xx"}, False), ({"hint": "yy"}, False)]
