"""Each controller as a pure function: what ends a run, what does not, and what it says."""

import pytest

from evolve_ray.config.options import Controller
from evolve_ray.evaluate.controller import CONTROLLERS, Decision, in_words
from evolve_ray.evaluate.figures import against_previous

UP, DOWN, LEVEL = (0.05, 0.01, 0.09), (-0.05, -0.09, -0.01), (0.01, -0.03, 0.05)


def interval(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


def moved(first=LEVEL, last=LEVEL, gain=LEVEL, reward=LEVEL, measure="exact_match", n=100):
    three = {"first": interval(*first), "last": interval(*last), "gain": interval(*gain)}
    return {"n": n, "measure": measure, **three, "reward": {**three, "last": interval(*reward)}}


def model(iteration, tokens=10.0, distinct=0.4, kl=0.5, **changes):
    rounds = {str(k): {"mean_response_tokens": 99.0, "distinct_2": 0.99} for k in range(1, 10)}
    rounds["10"] = {"mean_response_tokens": tokens, "distinct_2": distinct}  # the last one, though not by its text
    found = {"name": f"iteration {iteration}", "iteration": iteration, "splits": {"held": {"rounds": rounds}}}
    if iteration:
        found |= {"probe": {"kl_initial": kl}, "against_previous": {"held": moved(**changes)}}
    return found


def decide(name, *models, **options):
    return CONTROLLERS[name]([model(0), *models], Controller(name=name, split="held", **options))


def test_fixed_goes_on_whatever_happens():
    assert decide("fixed", model(1, tokens=900, first=DOWN, last=DOWN, reward=UP)).action == "continue"


def test_plateau_stops_when_nothing_grows_significantly():
    decision = decide("plateau", model(1))
    assert decision == Decision(
        "stop",
        "no significant improvement in 1 iteration: on held, against the model before, "
        "iteration 1: y_last +1.0 [-3.0, 5.0] points, y_last - y1 +1.0 [-3.0, 5.0] points",
    )


@pytest.mark.parametrize("changes", [{"last": UP}, {"gain": UP}, {"last": DOWN, "gain": UP}])
def test_plateau_goes_on_while_the_last_round_or_the_gain_grows(changes):
    assert decide("plateau", model(1, **changes)).action == "continue"


def test_plateau_does_not_take_a_fall_for_an_improvement():
    assert decide("plateau", model(1, last=DOWN, gain=DOWN)).action == "stop"


def test_plateau_waits_for_as_many_iterations_as_its_patience():
    still, grown = [model(number) for number in (1, 2, 3)], [model(number, last=UP) for number in (1, 2, 3)]
    assert decide("plateau", still[0], patience=2).action == "continue"
    assert decide("plateau", grown[0], still[1], patience=2).action == "continue"
    assert decide("plateau", still[0], grown[1], still[2], patience=2).action == "continue"
    decision = decide("plateau", grown[0], still[1], still[2], patience=2)
    assert decision.action == "stop"
    assert decision.reason.startswith("no significant improvement in 2 iterations: ")


def test_plateau_speaks_of_rewards_where_there_is_no_verifier():
    assert "y_last +0.010 [-0.030, 0.050], " in decide("plateau", model(1, measure="reward")).reason


@pytest.mark.parametrize("name", ["plateau", "guard"])
def test_models_that_cannot_be_compared_are_no_reason_to_stop(name):
    lost = {**model(1), "against_previous": {}, "probe": None, "splits": {"held": {"rounds": {}}}}
    decision = decide(name, lost)
    assert decision.action == "continue"
    assert decision.reason == "iteration 1: no prompt of held has a score in every round of this model and of the one before"


def test_guard_goes_on_and_says_what_it_saw():
    decision = decide("guard", model(1))
    assert decision.action == "continue"
    for said in ("y1 +1.0 [-3.0, 5.0] points", "1.00 times the 10.0 at the start", "0.400, 1.00 times", "0.50 nats"):
        assert said in decision.reason


def test_guard_fires_when_the_reward_rises_while_exact_match_falls():
    decision = decide("guard", model(1, last=DOWN, reward=UP))
    assert decision == Decision(
        "roll_back",
        "on held, reward of y_last +0.050 [0.010, 0.090] while exact match -5.0 [-9.0, -1.0] points against the model before",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"last": DOWN, "reward": LEVEL},
        {"last": DOWN, "reward": DOWN},
        {"last": LEVEL, "reward": UP},
        {"last": UP, "reward": UP},
        {"last": DOWN, "reward": UP, "measure": "reward"},
    ],
)
def test_guard_needs_both_proxy_and_truth_to_part(changes):
    assert decide("guard", model(1, **changes)).action == "continue"


def test_guard_fires_when_the_direct_answer_falls():
    assert decide("guard", model(1, first=DOWN)).reason == "on held, y1 -5.0 [-9.0, -1.0] points against the model before"
    assert decide("guard", model(1, first=(-0.05, -0.1, 0.0))).action == "continue"


@pytest.mark.parametrize(("tokens", "action"), [(20.0, "continue"), (20.1, "roll_back"), (5.0, "continue"), (4.9, "roll_back")])
def test_guard_fires_when_the_length_leaves_its_bounds(tokens, action):
    decision = decide("guard", model(1, tokens=tokens))
    assert decision.action == action
    assert ("(controller.max_length_ratio 2)" in decision.reason) == (action == "roll_back")


@pytest.mark.parametrize(("distinct", "action"), [(0.2, "continue"), (0.19, "roll_back"), (0.9, "continue")])
def test_guard_fires_when_diversity_is_lost(distinct, action):
    decision = decide("guard", model(1, distinct=distinct))
    assert decision.action == action
    assert ("(controller.min_distinct_ratio 0.5)" in decision.reason) == (action == "roll_back")


def test_guard_measures_against_the_policy_that_iteration_1_started_from():
    models = [model(0, tokens=50.0), model(0), model(1, tokens=18.0), model(2, tokens=30.0)]
    decision = CONTROLLERS["guard"](models, Controller(split="held"))
    assert "3.00 times the 10.0 at the start" in decision.reason


def test_guard_fires_at_a_divergence_above_its_limit_where_one_is_set():
    assert decide("guard", model(1, kl=90.0)).action == "continue"
    assert decide("guard", model(1, kl=3.0), max_kl=3.0).action == "continue"
    decision = decide("guard", model(1, kl=3.1), max_kl=3.0)
    assert decision.reason == "on held, KL to the initial policy is 3.10 nats a response (controller.max_kl 3)"


def test_guard_may_keep_the_iteration():
    assert decide("guard", model(1, first=DOWN), on_breach="stop").action == "stop"


def test_guard_names_every_bound_that_is_broken():
    reason = decide("guard", model(1, first=DOWN, tokens=99.0, distinct=0.01)).reason
    assert reason.count(";") == 2


def test_guard_ignores_splits_that_do_not_decide():
    here = model(1)
    here["against_previous"]["other"] = moved(first=DOWN)
    assert decide("guard", here).action == "continue"


@pytest.mark.parametrize("name", ["plateau", "guard"])
def test_fewer_prompts_than_needed_decide_nothing_and_the_reason_says_so(name):
    everything = {"first": DOWN, "last": DOWN, "reward": UP, "tokens": 99.0, "distinct": 0.01}
    decision = decide(name, model(1, n=12, **everything))
    assert decision == Decision(
        "continue", "decided nothing: iteration 1 has 12 prompts of held, at least 50 are needed (controller.min_prompts)"
    )
    assert decide(name, model(1, n=50, **everything)).action != "continue"
    assert decide(name, model(1, n=12, **everything), min_prompts=12).action != "continue"


def test_plateau_needs_the_prompts_in_each_iteration_that_it_looks_at():
    reason = decide("plateau", model(1, n=49), model(2), patience=2).reason
    assert reason.startswith("decided nothing: iteration 1 has 49 prompts")
    assert decide("plateau", model(1, n=49), model(2)).action == "stop"


def test_guard_measures_the_divergence_on_the_prompts_of_the_probe_and_not_of_the_split():
    decision = decide("guard", model(1, n=1, kl=3.1), max_kl=3.0)
    assert decision.action == "roll_back"
    assert decision.reason == (
        "KL to the initial policy is 3.10 nats a response (controller.max_kl 3); decided nothing: iteration 1 has 1 prompt of "
        "held, at least 50 are needed (controller.min_prompts)"
    )


def test_one_prompt_that_fell_rolls_nothing_back_even_where_one_is_enough_to_decide():
    """The figures of a real comparison: right before, wrong now."""
    tables = [
        ([{"draft_id": "d", "prompt_id": "p", "split": "held", "round": 1}],
         [{"draft_id": "d", "score": right, "correct": right}]) for right in (1.0, 0.0)
    ]  # fmt: skip
    fallen = {**model(1), "against_previous": against_previous(["held"], *tables)}
    assert fallen["against_previous"]["held"]["first"]["mean"] == -1.0
    assert decide("guard", fallen).reason.startswith("decided nothing: ")
    assert decide("guard", fallen, min_prompts=1).action == "continue"


def test_a_decision_in_words_names_the_options_that_it_changes():
    stored = {"action": "continue", "reason": "it is too hot"}
    assert in_words(stored) == "it is too hot"
    assert in_words(stored | {"options": {"sampling.temperature": 0.5, "strategy.name": "chain"}}) == (
        'it is too hot; from now on sampling.temperature = 0.5, strategy.name = "chain"'
    )
