"""Log-probabilities token by token: trees against separate forwards, the reference's table, and the engine's beside them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from evolve_ray.config.options import Trainer, Training
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.models.chat import Chat
from evolve_ray.refine.template import load_template
from evolve_ray.store import rows
from evolve_ray.train import tree_check
from evolve_ray.train.forwards import Part, Separate, Trees
from evolve_ray.train.objectives import Objective, find
from evolve_ray.train.tokens import engine_logps, mask_of
from evolve_ray.train.tree import lay_out
from tests.tensors import one_rank
from tests.tensors.one_rank import make_pairs, process_group

__all__ = ["process_group"]

CPU = torch.device("cpu")
NEEDS = ("chosen", "chosen_after_rejected")


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def reader(kind, tiny_model, model, pairs):
    """A reader of the only rank, without a process group."""
    spec = SimpleNamespace(template=load_template("tiny", "conversation"), training=Training(micro_pairs=4), trainer=Trainer())
    alone = SimpleNamespace(rank=0, world=1, device=CPU, all_max=lambda values: values)
    made = kind(spec, Chat(tiny_model), pairs, NEEDS, alone)
    made.config = model.config
    return made


def test_tokens_of_trees_are_those_of_separate_forwards_and_sum_to_the_values(tiny_model, model):
    pairs = make_pairs()
    pairs[2] |= {"chosen": "", "chosen_finished": False}  # an answer without a token
    found = {}
    for kind in (Separate, Trees):
        read, network = reader(kind, tiny_model, model, pairs), model
        if kind is Trees:
            network = tree_check.tree_model(model, CPU)
        else:
            model.set_attn_implementation("sdpa")
        with torch.no_grad():
            for part in read.parts(list(range(len(pairs)))):
                values, lengths = read.token_values(network, part)
                sums, counts = read.values(network, part)
                for name in NEEDS:
                    assert values[name].sum(1).tolist() == pytest.approx(sums[name].tolist(), abs=1e-5)
                    assert counts["chosen"].tolist() == [max(1, length) for length in lengths[name]]
                    for position, (row, weight) in enumerate(part.pairs):
                        if weight:
                            found[kind, row, name] = values[name][position, : lengths[name][position]].tolist()
                            assert not values[name][position, lengths[name][position] :].any()
    for row in range(len(pairs)):
        for name in NEEDS:
            assert found[Trees, row, name] == pytest.approx(found[Separate, row, name], abs=1e-5)
            assert len(found[Separate, row, name]) == reader(Separate, tiny_model, model, pairs).num_tokens(row)["chosen"]
    assert found[Separate, 2, "chosen"] == []


def test_one_sequence_by_hand(tiny_model, model):
    """In float64, token by token."""
    pairs = make_pairs(2)
    read = reader(Separate, tiny_model, model, pairs)
    sequence = read.sequences(1)[1]
    ids = torch.tensor([(*sequence.context, *sequence.response)])
    with torch.no_grad():
        logps = model.double()(input_ids=ids).logits[0].log_softmax(-1)
        model.float()
        values, _ = read.token_values(model, Part([(0, 1.0), (1, 1.0)]))
    start = len(sequence.context)
    by_hand = [logps[start + number - 1, token].item() for number, token in enumerate(sequence.response)]
    assert values["chosen_after_rejected"][1, : len(by_hand)].tolist() == pytest.approx(by_hand, abs=1e-5)


def test_a_part_of_padding_alone_has_no_rows_and_keeps_its_graph(tiny_model, model):
    read = reader(Trees, tiny_model, model, make_pairs())
    values, lengths = read.token_values(tree_check.tree_model(model, CPU), Part([], lay_out([], []), 1))
    assert (values["chosen"].shape, lengths["chosen"]) == ((0, 0), [])
    assert values["chosen"].requires_grad, "the backward pass of every rank reads every parameter"
    assert mask_of([], CPU).shape == (0, 0)


def pairs_with_advantages(**more):
    advantages = (1.0, -0.5, 2.0, -1.0, 0.25, 0.75)
    numbers = [{"advantage": value, "refined": float(number % 2)} for number, value in enumerate(advantages)]
    return [pair | {"numbers": own} | more for pair, own in zip(make_pairs(), numbers, strict=True)]


@pytest.mark.parametrize("forward", ["separate", "tree"])
def test_the_ratio_is_exactly_1_before_the_first_update_through_zero_3(tiny_model, tmp_path, monkeypatch, process_group, forward):
    """At both levels; the loss is then -A times the share of the tokens, and the table of the reference has the tokens."""
    for level in ("answer", "token"):
        training = {"objective": "policy_gradient", "objective_args": {"level": level}, "epochs": 2}
        out = one_rank.train(
            tiny_model, tmp_path / level, monkeypatch, pairs=pairs_with_advantages(), training=training,
            trainer={"forward": forward},
        )  # fmt: skip
        first, second = out["log"]
        assert (first["ratio"], first["clipped"], first["kl"]) == (1.0, 0.0, 0.0)
        assert first["loss"] == pytest.approx(-2.5 / 6)
        assert second["ratio"] != 1.0
        columns = set(out["reference"][0]) - set(rows.REFERENCE.names)
        assert columns == ({rows.token_column(name) for name in NEEDS} if level == "token" else set())
        for row in out["reference"] if level == "token" else ():
            for name in NEEDS:
                assert sum(row[rows.token_column(name)]) == pytest.approx(row[name], abs=1e-4)


def test_mismatch_is_measured_and_truncated_through_zero_3(tiny_model, tmp_path, monkeypatch, process_group):
    """The engine is 0.1 nats a token off, and one token of one answer 3 nats: factor exp(-0.1), and the cap."""
    exact = one_rank.train(
        tiny_model, tmp_path / "exact", monkeypatch, pairs=pairs_with_advantages(),
        training={"objective": "policy_gradient", "objective_args": {"level": "token"}},
    )  # fmt: skip
    pairs = pairs_with_advantages()
    for number, (pair, row) in enumerate(zip(pairs, exact["reference"], strict=True)):
        logps = [value + 0.1 for value in row[rows.token_column(NEEDS[number % 2])]]
        pair["chosen_logps"] = logps
    pairs[0]["chosen_logps"][0] -= 3.1
    for level, factor in (("token", (6 * 2.718281828**-0.1)), ("answer", None)):
        args = {"level": level, "mismatch": "truncate", "mismatch_cap": 2.0}
        training = {"objective": "policy_gradient", "objective_args": args}
        log = one_rank.train(tiny_model, tmp_path / level, monkeypatch, pairs=pairs, training=training)["log"]
        lengths = [len(pair["chosen_logps"]) for pair in pairs]
        assert log[0]["largest_mismatch"] == pytest.approx(3.0, abs=1e-4)
        assert log[0]["mismatch"] == pytest.approx((0.1 * 5 + (0.1 * (lengths[0] - 1) + 3.0) / lengths[0]) / 6, abs=1e-4)
        if factor:
            expected = (factor - 2.718281828**-0.1 / lengths[0] + 2.0 / lengths[0]) / 6
        else:
            expected = (2.0 + sum(2.718281828 ** (-0.1 * length) for length in lengths[1:])) / 6
        assert log[0]["mismatch_factor"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("level", ["answer", "token"])
def test_the_divergence_may_be_from_the_initial_policy(tiny_model, tmp_path, monkeypatch, process_group, level):
    """Iteration 2 of a run: the ratio is to the iteration's start and 1, the divergence is from the start of iteration 1."""
    training = {"objective": "policy_gradient", "objective_args": {"level": level, "kl": 0.1, "kl_to": "initial"}}
    pairs = pairs_with_advantages()
    first = one_rank.train(tiny_model, tmp_path / "1", monkeypatch, pairs=pairs, training=training)
    assert (first["log"][0]["ratio"], first["log"][0]["kl"]) == (1.0, 0.0)
    second = one_rank.train(
        first["checkpoint"], tmp_path / "2", monkeypatch, pairs=pairs, training=training, initial=tiny_model
    )  # fmt: skip
    assert second["log"][0]["ratio"] == 1.0
    kls = []
    for number, (before, now) in enumerate(zip(first["reference"], second["reference"], strict=True)):
        name = NEEDS[number % 2]
        assert now[rows.initial_column(name)] == pytest.approx(before[name], abs=1e-5)
        assert now[name] != before[name]
        columns = (name,) if level == "answer" else (rows.token_column(name),)
        for column in columns:
            shift = torch.tensor(now[column]) - torch.tensor(now[f"initial_{column}"])
            kls.append((torch.expm1(-shift) + shift).mean())
    assert second["log"][0]["kl"] == pytest.approx(torch.stack(kls).mean().item(), rel=1e-4)
    assert second["log"][0]["kl"] > 0


def test_engine_values_are_those_of_the_last_tokens():
    pairs = [{"pair_id": "a", "chosen_logps": [-1.0, -2.0, -3.0]}, {"pair_id": "b", "chosen_logps": [-4.0]}]
    assert engine_logps(pairs, [2, 1]).tolist() == [[-2.0, -3.0], [-4.0, 0.0]]
    with pytest.raises(IntegrityError, match="pair b: the engine gave 1 log-probabilities for 2 tokens"):
        engine_logps(pairs, [3, 2])


def by_token(policy, reference, training, tokens):
    return -(tokens.policy["chosen"] * tokens.mask["chosen"]).amin(1), {"length": tokens.mask["chosen"].sum(1).float()}


def undeclared(policy, reference, training, tokens):
    return by_token(policy, reference, training, tokens)


OWN = Objective(by_token, ("chosen",), reference=False, tokens=True)
UNDECLARED = Objective(undeclared, ("chosen",), reference=False)


def test_an_objective_of_ones_own_gets_tokens_by_name(tiny_model, tmp_path, monkeypatch, process_group):
    out = one_rank.train(tiny_model, tmp_path / "own", monkeypatch, training={"objective": f"{__name__}:OWN"})
    assert out["log"][0]["length"] == pytest.approx(sum(len(pair["chosen"]) + 1 for pair in make_pairs()) / 6)
    with pytest.raises(UserError, match=r"the loss of '.*UNDECLARED' takes `tokens`, so it must be declared with"):
        find(Training(objective=f"{__name__}:UNDECLARED"))
