"""The graph that chooses tokens on a device says what numpy says, in parts of rows or not."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from edgellm_runtime.graphs.token_choice import choosing_graph


@pytest.mark.parametrize("vocab", [1, 7, 30, 31, 1024, 1187 * 2])  # primes have one part
@pytest.mark.parametrize("rows", [1, 3])
def test_the_best_is_the_lowest_id_among_equals(vocab: int, rows: int) -> None:
    session = onnxruntime.InferenceSession(choosing_graph("float32", vocab, 1), providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(vocab)
    for kinds in (2, 1000):  # of two values there are many equals
        logits = draw.integers(-kinds, 0, (rows, 1, vocab)).astype(np.float32)
        ids, values, total = session.run(["ids", "values", "sum"], {"logits": logits})
        np.testing.assert_array_equal(ids[:, 0, 0], logits[:, 0].argmax(axis=1))
        np.testing.assert_array_equal(values[:, 0, 0], logits[:, 0].max(axis=1))
        np.testing.assert_allclose(total[:, 0, 0], logits[:, 0].sum(axis=1), rtol=1e-6)


def test_long_rows_are_cut_into_parts_but_not_for_libraries_that_plan_reductions_themselves() -> None:
    assert choosing_graph("float16", 49152, 1).count(b"ReduceMax") == 2
    assert choosing_graph("float16", 49152, 1, sized=True).count(b"ReduceMax") == 1
