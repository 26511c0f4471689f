"""Checks and commits the inputs of a run before an engine starts: models, template, prompts, preference triples."""

import dataclasses
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

from evolve_ray.config.load import from_json
from evolve_ray.config.options import Config
from evolve_ray.config.resolve import flatten, resolved
from evolve_ray.errors import IntegrityError, UserError, first_line
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.inputs.plugs import check_plugs
from evolve_ray.inputs.prompts import Prompter
from evolve_ray.models import folders, gate
from evolve_ray.refine.rendering import CLOCK, Rendering
from evolve_ray.refine.template import load_template
from evolve_ray.score.combined import local_judge, reward_model_field, reward_model_names
from evolve_ray.store import rows
from evolve_ray.store.files import write_atomic
from evolve_ray.store.run import Run
from evolve_ray.toy.parts import toy_parts

BEGAN = "began.json"
RESERVED = ("messages", "conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "tools",
            "documents", CLOCK)  # fmt: skip


def settle_config(config: Config, run: Run, *, rerun_changed: bool) -> str:
    """Stores the resolved configuration; raises `UserError` with the changed options if the run has another configuration.

    With `rerun_changed` it returns the changed options as text instead, with their values before and now.
    """
    path, shown = run.root / "config.json", ""
    if path.exists():
        try:
            stored = json.loads(path.read_bytes())
        except ValueError:
            raise IntegrityError(
                f"{path}: is damaged; delete it and submit again: no result is lost, each stage keeps its own options"
            ) from None
        before = flatten(resolved(from_json(stored, str(path)), runtime=False))
        now = flatten(resolved(config, runtime=False))
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name, "unset") != now.get(name, "unset"))
        shown = ", ".join(f"{name} ({before.get(name, 'unset')} -> {now.get(name, 'unset')})" for name in changed[:8])
        if changed and not rerun_changed:
            raise UserError(
                f"{run.root}: was started with another configuration; changed: {shown}; use another --run, or submit with "
                "--rerun-changed to compute the stages again that depend on these options"
            )
    write_atomic(path, json.dumps(resolved(config), indent=1, ensure_ascii=False).encode())
    return shown


def prepare(
    config: Config, run: Run, say: Callable[[str], None], start_ray: Callable[[], None], *, rerun_changed: bool,
    changed: str = "",
) -> Context:  # fmt: skip
    """Checks and commits all inputs of a run; raises `UserError` for a fault in any of them, before Ray starts."""
    context, toy = begin(config, run, say, start_ray, rerun_changed=rerun_changed, changed=changed)
    Prompter(context, toy).commit_all()
    return context


def begin(
    config: Config, run: Run, say: Callable[[str], None], start_ray: Callable[[], None], *, rerun_changed: bool,
    changed: str = "", model: str | None = None,
) -> tuple[Context, dict[str, str]]:  # fmt: skip
    """(a context without prompts, the paths of the tiny world's parts by name).

    `model` replaces `model.path`; the caller has taken it through the gate.
    """
    check_plugs(config)
    template = load_template(config.template.name, config.template.layout, config.strategy.name)
    toy = toy_parts(config, run, say) if config.toy else {}
    folder = folders.resolve(model or toy.get(config.model.path, config.model.path), "model.path")
    policy = Policy(folder, folders.content_hash(folder))
    field = reward_model_field(config.scorer)
    reward_models = {name: folders.resolve(toy.get(name, name), field) for name in reward_model_names(config.scorer)}
    second = {name: folders.resolve(toy.get(part.path, part.path), f"models.{name}.path") for name, part in config.models.items()}
    rendering = settle_rendering(config, run, [folder, *reward_models.values(), *second.values()])
    template = dataclasses.replace(template, rendering=rendering)
    found = [] if model else [check_model(policy, policy_need(config, rendering), run, say)]
    context = Context(config, run, say, start_ray, rerun_changed, template, policy, changed=changed)
    for name, folder in reward_models.items():
        content = folders.content_hash(folder)
        need = reward_model_need(config, rendering.for_reward_model)
        found.append(check_model(Policy(folder, content), need, run, say))
        # Its scores are those of the day that its template prints, so the day is part of what it is.
        context.reward_models[name] = Policy(folder, rows.digest([content, rendering.day]) if asks_date(folder) else content)
    for name, folder in second.items():
        need = second_need(config, name, rendering.for_reward_model)
        context.models[name] = Policy(folder, folders.content_hash(folder))
        found.append(check_model(context.models[name], need, run, say))
    context.first_models = dict(context.models)
    name = local_judge(config.scorer)
    if name and name not in ("policy", "initial"):
        folder = folders.resolve(toy.get(name, name), "scorer.args.model")
        context.judge = Policy(folder, folders.content_hash(folder))
        check_model(context.judge, policy_need(config, rendering.for_reward_model, "scorer.args.model"), run, say)
    context.dropout = any(model.dropout for model in found)
    return context, toy


def check_model(model: Policy, need: gate.Need, run: Run, say: Callable[[str], None]) -> gate.Model:
    """Takes a model through the gate, prints what it is, and returns it."""
    found = gate.check(model.folder, model.hash, need, run.root)
    say(f"  {need.field}: {found.summary}")
    return found


def policy_need(config: Config, rendering: Rendering, field: str = "model.path") -> gate.Need:
    """What a recipe asks of its policy; `field` is the option or argument that names the model."""
    length = config.model.context_tokens
    return gate.Need(field, length, "model.context_tokens", config.model.dtype, rendering=rendering)


def second_need(config: Config, name: str, rendering: Rendering) -> gate.Need:
    """What a recipe asks of a further model, which renders conversations by its own template."""
    own = config.models[name].context_tokens
    length, option = (own, f"models.{name}.context_tokens") if own else (config.model.context_tokens, "model.context_tokens")
    return gate.Need(f"models.{name}.path", length, option, config.model.dtype, rendering=rendering)


def reward_model_need(config: Config, rendering: Rendering) -> gate.Need:
    """What a recipe asks of its reward models."""
    scorer = config.scorer
    output = None if scorer.output < 0 else scorer.output
    return gate.Need(
        reward_model_field(scorer), scorer.max_tokens, "scorer.max_tokens", scorer.dtype, classifier=True, output=output,
        rendering=rendering,
    )  # fmt: skip


def settle_rendering(config: Config, run: Run | None, models: list[Path]) -> Rendering:
    """How this run renders conversations. A template that prints the date prints the day on which the run began.

    Without a run that day is today.
    """
    chat_template = read_chat_template(config)
    for name in config.model.template_arguments:
        if name in RESERVED:
            raise UserError(f"model.template_arguments.{name}: is set by evolve-ray itself; remove it")
    today = date.today().isoformat
    day = (began(run) if run else today()) if CLOCK in chat_template or any(map(asks_date, models)) else ""
    return Rendering(chat_template, config.model.template_arguments, day, config.thinking)


def read_chat_template(config: Config) -> str:
    """The text of `model.chat_template`; "" if the model's own template is used."""
    file = config.model.chat_template
    try:
        text = Path(file).read_text(encoding="utf-8") if file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template: {file}: cannot be read: {first_line(error)}") from None
    if file and not text.strip():
        raise UserError(f"model.chat_template: {file}: is empty")
    return text


def asks_date(folder: Path) -> bool:
    """Whether the chat template of a model prints the date."""
    files = [folder / name for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")]
    return any(CLOCK in file.read_text(encoding="utf-8", errors="replace") for file in files if file.exists())


def began(run: Run) -> str:
    """The day on which the run began, YYYY-MM-DD; it is stored when it is first asked for."""
    path = run.root / BEGAN
    if not path.exists():
        write_atomic(path, json.dumps({"day": date.today().isoformat()}).encode())
    return json.loads(path.read_bytes())["day"]
