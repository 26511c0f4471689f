"""bfloat16 trains with the gradients of float32, however many micro-batches they are summed from."""

import pytest

from tests.tensors import zoo
from tests.tensors.one_rank import make_pairs, process_group, train

__all__ = ["process_group"]

pytestmark = pytest.mark.slow
COUNT = 256
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def norms(tmp_path_factory, process_group):
    """The gradient norm of one batch of equal pairs by number type and `micro_pairs`: sums that only grow lose the most."""
    root = tmp_path_factory.mktemp("precision")
    folder = zoo.save("llama3", root / "model", **SHAPE)
    pairs = [make_pairs(1)[0] | {"pair_id": f"pair-{number}"} for number in range(COUNT)]
    with pytest.MonkeyPatch.context() as monkeypatch:

        def norm(dtype, micro_pairs):
            settings = {"micro_pairs": micro_pairs, "gradient_clip": 0.0}
            out = root / f"{dtype}-{micro_pairs}"
            return train(folder, out, monkeypatch, pairs=pairs, training=settings, dtype=dtype)["log"][0]["gradient_norm"]

        return {"float32": norm("float32", 64)} | {micro_pairs: norm("bfloat16", micro_pairs) for micro_pairs in (1, 8, 64)}


@pytest.mark.parametrize("micro_pairs", [1, 8, 64])
def test_the_gradient_does_not_depend_on_the_number_of_micro_batches(norms, micro_pairs):
    assert norms[micro_pairs] == pytest.approx(norms[64], rel=0.002)


def test_the_gradient_of_bfloat16_is_that_of_float32(norms):
    assert norms[1] == pytest.approx(norms["float32"], rel=0.005)
