"""Trees against separate forwards: the same log-probabilities and gradients, whatever is shared and however it is packed."""

import itertools

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from evolve_ray.errors import UserError
from evolve_ray.models.chat import Chat
from evolve_ray.refine.template import Template
from evolve_ray.store.rows import REFERENCE
from evolve_ray.train import attention, logprobs, tree_check
from evolve_ray.train.logprobs import block_mask, dense_mask, num_chunks, pair_sequences, sequence_logps, tree_logps
from evolve_ray.train.tree import FORWARD_TOKENS, Sequence, build_tree, lay_out, num_shared, pack, split_rows
from tests.plain.conftest import llama_config

CPU = torch.device("cpu")
NAMES = tuple(name for name in REFERENCE.names if name != "pair_id")
VOCABULARY = 60
HEADS = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = HEADS | {"num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "mistral": SMALL,
    "gemma2": SMALL | {"sliding_window": 64},
    "gemma3_text": SMALL | {"sliding_window": 64},
    "cohere": SMALL,
    "granite": SMALL | {"logits_scaling": 8.0},
    "gpt_neox": HEADS,
}
ALL_LOGITS = {"gemma2", "cohere", "granite"}  # models that do more to their logits than the head does


def make(kind="llama", *, scale=0.3, **more):
    """A random model whose sequences differ widely in probability."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **KINDS.get(kind, {}) | more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=scale)
    return model


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Attention in blocks of a few queries, as rows of many tokens have them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK_TOKENS", 5)
        yield


@pytest.fixture(scope="module")
def llama():
    return make()


def packed(groups, **options):
    given = {"keys": [str(n) for n in range(len(groups))], "max_tokens": 200, "max_groups": 100}
    return pack(groups, **given | options)


def by_trees(model, groups, chunks=None, **options):
    """`[group][sequence]` log-probs; gradients of their weighted sum are left in the model."""
    tree, found = tree_check.tree_model(model, CPU), [None] * len(groups)
    for forward in packed(groups, **options):
        values = tree_logps(tree, forward, CPU, num_chunks(forward) if chunks is None else chunks)
        parts = dict(zip(forward.groups, values.split([len(groups[group]) for group in forward.groups]), strict=True))
        backward(list(parts.values()), [groups[group] for group in parts])
        for group, part in parts.items():
            found[group] = part.tolist()
    return found


def by_rows(model, groups):
    """The same from one padded row a sequence, the library's own attention and all logits."""
    model.set_attn_implementation("sdpa")
    found = []
    for group in groups:
        values = sequence_logps(model, group, 0, CPU)
        backward([values], [group])
        found.append(values.tolist())
    return found


def backward(values, groups):
    """Weights of its own for every sequence, or wrong owners would go unseen."""
    weighted = [
        value * (1 + len(s.response) + 0.1 * len(s.context))
        for part, group in zip(values, groups, strict=True)
        for value, s in zip(part, group, strict=True)
    ]
    if torch.is_grad_enabled() and weighted:
        torch.stack(weighted).sum().backward()


def gradients(model):
    found = {name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same(model, groups, rel=1e-5, **options):
    trees, tree_gradients = by_trees(model, groups, **options), gradients(model)
    rows, row_gradients = by_rows(model, groups), gradients(model)
    for tree, row in zip(trees, rows, strict=True):
        assert tree == pytest.approx(row, rel=rel, abs=rel)
    scale = max(gradient.norm().item() for gradient in row_gradients.values())
    for name, gradient in row_gradients.items():
        assert (tree_gradients[name] - gradient).norm().item() <= rel * max(scale, 1e-3), name


def tokens(length, start):
    """Token ids that differ from those of another start at their first place."""
    return tuple((start + 7 * place + place * place) % VOCABULARY for place in range(length))


def pair(x, w, l, z):  # noqa: E741
    """The six sequences of a pair in the `conversation` layout, from token ids."""
    after = [Sequence(x + draft + z, answer) for draft in (l, w) for answer in (w, l)]
    return [Sequence(x, w), Sequence(x, l), *after]


PAIR = pair(tokens(9, 3), tokens(7, 11), tokens(5, 12), tokens(4, 30))

# Few different tokens, so that random sequences share beginnings of all lengths, are equal, or begin one another.
drawn_tokens = st.lists(st.integers(0, 2), max_size=6).map(tuple)
drawn_sequence = st.builds(Sequence, drawn_tokens.map(lambda ids: (1, *ids)), drawn_tokens)
drawn_groups = st.lists(st.lists(drawn_sequence, min_size=1, max_size=5), min_size=1, max_size=5)


def nodes_of(sequences):
    """The trie by its definition: every beginning of what a sequence reads."""
    read = [(*s.context, *s.response)[:-1] for s in sequences if s.response]
    return {ids[: end + 1] for ids in read for end in range(len(ids))}


@given(st.lists(drawn_sequence, max_size=8))
@settings(deadline=None, max_examples=200)
def test_a_trie_has_each_beginning_once_and_knows_its_ancestors(sequences):
    tree = build_tree(sequences)
    paths: list[tuple[int, ...]] = []
    for node, (token, depth) in enumerate(zip(tree.ids, tree.depths, strict=True)):
        above = [other for other in range(node + 1) if node < tree.ends[other]]
        assert [tree.depths[other] for other in above] == list(range(depth + 1))
        paths.append(tuple(tree.ids[other] for other in above))
        assert paths[-1][-1] == token
    assert len(paths) == len(set(paths))
    assert set(paths) == nodes_of(sequences)
    for sequence, where in zip(sequences, tree.where, strict=True):
        assert len(where) == len(sequence.response)
        for place, node in enumerate(where):
            assert paths[node] == sequence.context + sequence.response[:place]


@given(drawn_groups, st.integers(1, 60), st.integers(1, 6), st.booleans(), st.integers(1, 3))
@settings(deadline=None, max_examples=200)
def test_packing_keeps_every_group_once_and_the_limits(groups, max_tokens, max_groups, one_row, num_keys):
    keys = [str(number % num_keys) for number in range(len(groups))]
    forwards = packed(groups, keys=keys, max_tokens=max_tokens, max_groups=max_groups, one_row=one_row)
    assert sorted(group for forward in forwards for group in forward.groups) == list(range(len(groups)))
    for forward in forwards:
        assert len(forward.groups) <= max_groups
        largest = max(1, *(len(build_tree(groups[group]).ids) for group in forward.groups))
        if one_row:
            assert forward.ids_RW.shape[0] == 1
            assert forward.ids_RW.shape[1] % 128 == 0
            assert forward.num_tokens <= max(max_tokens, largest)
        else:
            assert forward.ids_RW.size <= max(max_tokens, largest)
        assert forward.num_sequences == sum(len(groups[group]) for group in forward.groups)
        assert len(forward.where_N) == sum(len(s.response) for group in forward.groups for s in groups[group])
    again = packed(groups, keys=keys, max_tokens=max_tokens, max_groups=max_groups, one_row=one_row)
    for one, other in zip(forwards, again, strict=True):
        assert one.ids_RW.tolist() == other.ids_RW.tolist()
        assert one.groups == other.groups


@given(st.lists(st.integers(1, 500), max_size=7))
@settings(deadline=None, max_examples=100)
def test_rows_are_cut_into_the_forwards_that_cost_least(lengths):
    lengths.sort(reverse=True)
    cuts = split_rows(lengths)
    assert [row for first, end in cuts for row in range(first, end)] == list(range(len(lengths)))

    def cost(ends):
        return sum((end - first) * lengths[first] + FORWARD_TOKENS for first, end in zip((0, *ends), ends, strict=False))

    inner = range(1, len(lengths))
    chosen = (choice for size in range(len(lengths)) for choice in itertools.combinations(inner, size))
    assert cost([end for _, end in cuts]) == min((cost([*choice, len(lengths)]) for choice in chosen), default=0)


@given(drawn_groups, st.integers(1, 60), st.integers(1, 5))
@settings(deadline=None, max_examples=25)
def test_random_trees_have_the_log_probabilities_and_gradients_of_separate_forwards(llama, groups, max_tokens, chunks):
    assert_same(llama, groups, max_tokens=max_tokens, chunks=chunks)


@pytest.mark.parametrize("lengths", [(128, 256, 256, 32), (5, 3, 9, 2), (4, 1, 1, 1), (1, 1, 2, 1)])
def test_tokens_of_a_pair_are_those_of_the_formula(lengths):
    x, w, l, z = lengths  # noqa: E741
    first = {"x": 3, "w": 11, "l": 12, "z": 30}
    sequences = pair(tokens(x, first["x"]), tokens(w, first["w"]), tokens(l, first["l"]), tokens(z, first["z"]))
    assert len(build_tree(sequences).ids) == x + 2 * z + 3 * (w + l) - 4
    assert sum(len(s.context) + len(s.response) for s in sequences) == 6 * x + 4 * z + 5 * (w + l)
    if lengths == (128, 256, 256, 32):
        assert (len(build_tree(sequences).ids), 6 * x + 4 * z + 5 * (w + l)) == (1724, 3456)


@pytest.mark.parametrize("layout", ["conversation", "one_message"])
def test_a_rendered_pair_shares_its_trunk(tiny_model, layout):
    """Through the chat template: `conversation` has the tokens of the formula, `one_message` shares what it can."""
    chat = Chat(tiny_model)
    template = Template(layout=layout, first="{prompt}", refine="fix", one_message="fix {prompt} {draft}")
    row = {"prompt": "sort:bca", "chosen": "abc", "rejected": "cab", "chosen_finished": True, "rejected_finished": True}
    sequences = pair_sequences(chat, template, row, NAMES)
    size = len(build_tree(list(sequences.values())).ids)
    x, w, l = (len(part) for part in (sequences["chosen"].context, *(sequences[n].response for n in ("chosen", "rejected"))))  # noqa: E741
    after = len(sequences["chosen_after_chosen"].context)
    if layout == "conversation":
        assert size == x + 2 * (after - x - w) + 3 * (w + l) - 4
    else:
        common = num_shared(sequences["chosen_after_chosen"].context, sequences["chosen_after_rejected"].context)
        assert common >= len("fix sort:bca")
        assert size < sum(len(s.context) + len(s.response) for s in sequences.values()) - 2 * common


def test_pairs_of_one_prompt_share_its_trunk():
    x, z = tokens(20, 3), tokens(3, 30)
    groups = [pair(x, tokens(4, 11), tokens(6, 12), z), pair(x, tokens(5, 13), tokens(4, 14), z), pair(tokens(9, 40), z, x, z)]
    (forward,) = packed(groups, keys=["a", "a", "b"], max_tokens=400)
    alone = [len(build_tree(group).ids) for group in groups]
    assert forward.num_tokens == sum(alone) - 20
    assert forward.ids_RW.shape == (1 if alone[2] + 20 > sum(alone[:2]) else 2, sum(alone[:2]) - 20)


def test_a_beginning_of_all_prompts_is_in_a_row_once():
    system = tokens(30, 3)
    groups = [[Sequence((*system, 50 + n, 40), (7, 8, 9))] for n in range(4)]
    (forward,) = packed(groups, max_tokens=1000, one_row=True)
    assert forward.num_tokens == 30 + 4 * 4


EDGES = {
    "response of no token": [[Sequence((1, 2, 3), ()), Sequence((1, 2, 3), (4, 5))]],
    "nothing but empty responses": [[Sequence((1, 2, 3), ()), Sequence((4,), ())]],
    "response of one token": [[Sequence((1,), (2,)), Sequence((1,), (3,)), Sequence((1, 2), (3,))]],
    "equal answers": [pair(tokens(5, 3), tokens(6, 11), tokens(6, 11), tokens(2, 30))],
    "one answer begins the other": [pair(tokens(5, 3), tokens(6, 11), tokens(3, 11), tokens(2, 30))],
    "the same pair twice": [PAIR, PAIR],
    "one empty answer": [pair(tokens(5, 3), tokens(6, 11), (), tokens(2, 30))],
    "very different lengths": [pair(tokens(90, 3), tokens(80, 11), tokens(2, 12), tokens(3, 30)), PAIR],
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_are_no_special_cases(llama, name):
    for max_tokens in (1, 100, 10_000):
        assert_same(llama, EDGES[name], max_tokens=max_tokens)


def test_no_groups_need_no_forward_and_no_rows_make_one_that_counts_nowhere(llama):
    assert packed([]) == []
    dummy = lay_out([], [])
    values = tree_logps(tree_check.tree_model(llama, CPU), dummy, CPU, 3)
    assert values.shape == (0,)
    values.sum().backward()
    assert all(gradient.abs().sum() == 0 for gradient in gradients(llama).values())


@pytest.mark.parametrize("chunks", [0, 1, 2, 5, 39, 200])
def test_chunks_change_nothing(llama, chunks):
    assert_same(llama, [PAIR, PAIR[::-1]], chunks=chunks, max_tokens=300)


def test_the_head_never_sees_more_than_a_chunk(llama, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_TOKENS", 10)
    seen = []
    hook = llama.get_output_embeddings().register_forward_hook(lambda module, given, out: seen.append(out.shape))
    assert_same_values = by_trees(llama, [PAIR])
    hook.remove()
    gradients(llama)
    assert len(assert_same_values[0]) == 6
    targets = sum(len(s.response) for s in PAIR)
    assert len(seen) == 2 * -(-targets // 10)  # once in the forward pass, once again in the backward pass
    assert max(shape[0] for shape in seen) <= 10


def test_gradient_checkpointing_changes_nothing():
    model = make().train()
    model.gradient_checkpointing_enable()
    assert_same(model, [PAIR, EDGES["equal answers"][0]])


def test_tied_embeddings_get_both_gradients():
    assert_same(make(tie_word_embeddings=True), [PAIR])


def test_attention_reads_no_key_that_a_block_does_not_see(monkeypatch):
    read = []
    real = attention.sdpa_attention_forward

    def counted(module, query, key, value, mask, **options):
        read.append((query.shape[2], key.shape[2]))
        return real(module, query, key, value, mask, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    (forward,) = packed([PAIR])
    with torch.no_grad():
        tree_logps(tree_check.tree_model(make(num_hidden_layers=1), CPU), forward, CPU, 1)
    mask = dense_mask(torch.from_numpy(forward.ends_RW))[0, 0]
    assert read == [(len(block), int(block.any(0).sum())) for block in mask.split(5)]
    assert sum(queries * keys for queries, keys in read) < 0.6 * mask.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_read_exactly(kind):
    model = make(kind).eval()
    tree = tree_check.tree_model(model, CPU)
    chunked = tree_check.check_tree(tree, tree, CPU)
    assert chunked == (kind not in ALL_LOGITS)
    assert_same(model, [PAIR, EDGES["one answer begins the other"][0]], chunks=3 if chunked else 0)


def test_bf16_is_no_further_from_float64_than_separate_forwards():
    exact = make().double()
    half = make().bfloat16()
    groups = [pair(tokens(20, n), tokens(30, n + 9), tokens(25, n + 20), tokens(5, n + 31)) for n in range(6)]
    exact.load_state_dict(half.state_dict())
    with torch.no_grad():
        reference = [by_float64(exact, group) for group in groups]
        errors = {
            name: sum(abs(a - b) for one, two in zip(found, reference, strict=True) for a, b in zip(one, two, strict=True))
            for name, found in {"trees": by_trees(half, groups), "rows": by_rows(half, groups)}.items()
        }
    assert 0 < errors["trees"] <= 1.25 * errors["rows"]


def by_float64(model, group):
    found = []
    for s in group:
        logits = model(input_ids=torch.tensor([[*s.context, *s.response]])).logits[0].double().log_softmax(dim=1)
        chosen = logits[len(s.context) - 1 : -1].gather(1, torch.tensor(s.response)[:, None])
        found.append(chosen.sum().item())
    return found


@given(drawn_groups)
@settings(deadline=None, max_examples=20)
def test_the_mask_of_flex_attention_is_the_dense_one(groups):
    (forward,) = packed(groups, max_tokens=1000, one_row=True)
    ends = torch.from_numpy(forward.ends_RW)
    mask = block_mask(ends)
    node = torch.arange(ends.shape[1])
    sees = mask.mask_mod(torch.tensor(0), torch.tensor(0), node[:, None], node[None, :])
    assert torch.equal(sees, dense_mask(ends)[0, 0])
    assert mask.shape == (1, 1, *sees.shape)


REFUSED = {
    "mamba": {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1},
    "bloom": {"vocab_size": 60, "hidden_size": 32, "n_layer": 1, "n_head": 2},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_without_a_mask_of_its_own_is_refused_by_name(kind):
    with pytest.raises(UserError, match=rf"trainer.forward: is 'tree', but {kind} .*; set trainer.forward = \"separate\""):
        tree_check.tree_model(make(kind, **REFUSED[kind]), CPU)


def test_a_sequence_beyond_a_sliding_window_is_refused():
    model = make("mistral", sliding_window=20)
    assert tree_check.attention_limit(model.config) == 20
    short, long = (lay_out([[Sequence(tokens(length - 3, 3), (4, 5, 6, 7))]], [[0]]) for length in (20, 21))
    tree_check.check_length(model.config, short)
    with pytest.raises(UserError, match="mistral has layers that see only 20 tokens back, and a sequence has 21 tokens"):
        tree_check.check_length(model.config, long)
    assert tree_check.attention_limit(make("qwen2").config) is None
    assert tree_check.attention_limit(make("gemma3_text").config) == 64


def test_a_model_that_ignores_the_mask_is_refused_by_its_numbers(monkeypatch):
    monkeypatch.setattr(logprobs, "dense_mask", lambda ends: dense_mask(torch.full_like(ends, 10**6)))
    tree = tree_check.tree_model(make(), CPU)
    with pytest.raises(UserError, match=r"log-probabilities of llama in a tree differ from those of its own forward by .* nats"):
        tree_check.check_tree(tree, tree, CPU)


def test_the_small_world_passes_its_own_check():
    model = AutoModelForCausalLM.from_config(llama_config(transformers.LlamaConfig, 64))
    tree = tree_check.tree_model(model.train(), CPU)
    assert tree_check.check_tree(tree, tree, CPU)
    assert tree.training
