"""The tiny task, sorting letters: prompts, noisy answers, preference triples, and the verifier."""

import hashlib
import random

from rapidfuzz.distance import Levenshtein

LETTERS = "abcdefghij"

# split -> (verb of the prompt, shortest and longest letter string, side of the hash that its strings come from)
SPLITS = {
    "train": ("sort", 8, 12, "train"),
    "heldout": ("sort", 8, 12, "heldout"),
    "long": ("sort", 13, 15, "heldout"),
    "desc": ("desc", 8, 12, "heldout"),
}
HELDOUT_SHARE = 8  # one letter string in this many is held out


# Noisy answers leave room for improvement. Many ties, and a sibling task, teach the model to keep a good draft as well as to
# correct a wrong one.
TRIPLES = {"tie_fraction": 0.4, "tie_clean_fraction": 0.8, "clean_fraction": 0.5, "desc_fraction": 0.2}


def side_of(letters: str) -> str:
    """`heldout` or `train`. Only the letters decide: no count, seed or order can move a string to the other side."""
    digest = hashlib.blake2b(letters.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % HELDOUT_SHARE == 0 else "train"


def draw_letters(rng: random.Random, shortest: int, longest: int, side: str) -> str:
    """A uniformly drawn string of `shortest` to `longest` letters on `side`."""
    while True:
        letters = "".join(rng.choices(LETTERS, k=rng.randint(shortest, longest)))
        if side_of(letters) == side:
            return letters


def solve(verb: str, letters: str) -> str:
    """The right answer to the prompt `verb:letters`: the letters in ascending (`sort`) or descending (`desc`) order."""
    return "".join(sorted(letters, reverse=verb == "desc"))


def make_prompts(split: str, count: int, seed: int) -> list[dict]:
    """`count` distinct rows `{prompt, answer}` of `split`; with the same seed, a longer list begins with the shorter one.

    The strings of `heldout`, `long` and `desc` are never on the train side, for all counts and seeds. Raises `ValueError` for an
    unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    return _draw_prompts(split, count, f"{split}:{seed}")


def _draw_prompts(split: str, count: int, stream: str) -> list[dict]:
    verb, shortest, longest, side = SPLITS[split]
    rng = random.Random(stream)
    rows: dict[str, dict] = {}
    while len(rows) < count:
        letters = draw_letters(rng, shortest, longest, side)
        prompt = f"{verb}:{letters}"
        rows.setdefault(prompt, {"prompt": prompt, "answer": solve(verb, letters)})
    return list(rows.values())


def corrupt(answer: str, rng: random.Random) -> str:
    """`answer` after 1 to 3 single-letter edits (substitute, insert, delete); never `answer` itself."""
    while True:
        letters = list(answer)
        for _ in range(rng.randint(1, 3)):
            edit = rng.choice(("substitute", "insert", "delete"))
            if edit == "insert" or not letters:
                letters.insert(rng.randint(0, len(letters)), rng.choice(LETTERS))
            elif edit == "substitute":
                letters[rng.randrange(len(letters))] = rng.choice(LETTERS)
            else:
                del letters[rng.randrange(len(letters))]
        if "".join(letters) != answer:
            return "".join(letters)


def make_triples(
    count: int,
    seed: int,
    tie_fraction: float = 0.25,
    clean_fraction: float = 0.65,
    desc_fraction: float = 0.0,
    tie_clean_fraction: float | None = None,
) -> list[dict]:
    """`count` rows `{prompt, answer, chosen, rejected}` on distinct train-side prompts, for activation SFT.

    `chosen` is right with probability `clean_fraction`, else 1 to 3 edits away. `rejected` is `chosen` after 1 to 3 more edits
    that lower its reward. With probability `tie_fraction` it is `chosen` itself (a tie): a model that never sees a draft worth
    keeping learns to change right drafts. In a tie, `chosen` is right with probability `tie_clean_fraction`, if that is set:
    with 1.0 only right drafts are shown as worth keeping. A share `desc_fraction` of the prompts asks for descending order of
    the same letters.
    """
    rng, verbs = random.Random(f"triples:{seed}"), random.Random(f"triples-verbs:{seed}")
    rows = _draw_prompts("train", count, f"triples-prompts:{seed}")
    for row in rows:
        if verbs.random() < desc_fraction:
            letters = row["prompt"].partition(":")[2]
            row |= {"prompt": f"desc:{letters}", "answer": solve("desc", letters)}
        row["chosen"] = row["answer"] if rng.random() < clean_fraction else corrupt(row["answer"], rng)
        tie = rng.random() < tie_fraction
        if tie and tie_clean_fraction is not None:
            row["chosen"] = row["answer"] if rng.random() < tie_clean_fraction else corrupt(row["answer"], rng)
        row["rejected"] = row["chosen"]
        while not tie and gold_reward(row["rejected"], row["answer"]) >= gold_reward(row["chosen"], row["answer"]):
            row["rejected"] = corrupt(row["chosen"], rng)
    return rows


WORST, BEST = 1, 9  # ratings of the tiny world have one digit, and so one token


def judgement(response: str, answer: str) -> tuple[str, int]:
    """(a judge's reply, its rating). The reply marks each letter of the response with +, if the right answer has it there, or -.

    The rating is 9 without a -, and one less for each, down to 1. A missing letter counts as a wrong one.
    """
    size = max(len(response), len(answer))
    pairs = list(zip(response.ljust(size, "."), answer.ljust(size, "."), strict=True))
    rating = max(WORST, BEST - sum(letter != right for letter, right in pairs))
    return "".join(letter + "-+"[letter == right] for letter, right in pairs) + f" Rating: {rating}", rating


def draw_judgement(rng: random.Random, letters: str) -> dict:
    """A triple that teaches to judge an answer about `letters`: chosen is the true judgement, rejected has another rating."""
    verb = "desc" if rng.random() < 0.2 else "sort"
    answer = solve(verb, letters)
    response = answer if rng.random() < 0.45 else corrupt(answer, rng)
    reply, rating = judgement(response, answer)
    other = rng.choice([number for number in range(WORST, BEST + 1) if number != rating])
    return {"prompt": f"judge {verb}:{letters} {response}", "answer": reply, "chosen": reply, "rejected": f"{reply[:-1]}{other}"}


def make_judgements(count: int, seed: int, share: float = 0.5) -> list[dict]:
    """`count` triples of which a share teaches to judge; the others are those of `make_triples` as the tiny world makes them.

    The letters of all are on the train side.
    """
    rng = random.Random(f"judgements:{seed}")
    num_judged = round(share * count)
    triples = make_triples(count - num_judged, seed, **TRIPLES)
    for row in _draw_prompts("train", num_judged, f"judgements-prompts:{seed}"):
        triples.append(draw_judgement(rng, row["prompt"].partition(":")[2]))
    rng.shuffle(triples)
    return triples


def gold_reward(response: str, answer: str) -> float:
    """1 - edit distance / length of the longer text, in [0, 1]; exactly 1.0 if and only if `response.strip() == answer`."""
    response = response.strip()
    if response == answer:
        return 1.0
    return 1.0 - Levenshtein.distance(response, answer) / max(len(response), len(answer))


class SortVerifier:
    """The verifier of the tiny task: a reward in [0, 1] per response; 1.0 means exactly right."""

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        """One reward per response; the three lists have one entry per response. Raises `ValueError` if an answer is missing."""
        if not len(prompts) == len(answers) == len(responses):
            raise ValueError(f"lengths differ: {len(prompts)} prompts, {len(answers)} answers, {len(responses)} responses")
        rewards = []
        for prompt, answer, response in zip(prompts, answers, responses, strict=True):
            if answer is None:
                raise ValueError(f"prompt {prompt!r} has no gold answer to verify against; add one, or score with a reward model")
            rewards.append(gold_reward(response, answer))
        return rewards
