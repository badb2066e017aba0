from __future__ import annotations

import pytest
from generation_fakes import fake_model

from edgellm_runtime.checks.bench import bench
from edgellm_runtime.errors import ContextError, OptionError


def test_bench_reports_every_figure(tmp_path):
    model = fake_model(tmp_path)
    result = bench(model, prompt_tokens=9, new_tokens=7, rounds=2)
    assert set(result) == {
        "load_s", "ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_mb", "itl_ms", "device",
        "threads", "versions", "prompt_tokens", "new_tokens", "rounds",
    }  # fmt: skip
    assert set(result["itl_ms"]) == {"p50", "p95", "p99"}
    assert set(result["versions"]) == {"python", "numpy", "onnxruntime", "edgellm"}
    assert (result["prompt_tokens"], result["new_tokens"], result["rounds"], result["device"]) == (9, 7, 2, "cpu")
    assert result["ttft_ms"] > 0
    assert result["decode_tokens_per_s"] > 0
    assert result["peak_rss_mb"] > 1
    assert (result["load_s"], result["threads"]) == (None, None)  # it was loaded by someone else
    assert model.session.read == 3 * (9 + 7)  # a warm-up and two rounds, the last token of each not read


def test_bench_loads_a_path_and_times_it(tmp_path, monkeypatch):
    import edgellm_runtime

    seen = {}

    def load(path, *, device, threads):
        seen.update(path=path, device=device, threads=threads)
        return fake_model(tmp_path)

    monkeypatch.setattr(edgellm_runtime, "load", load, raising=False)
    result = bench(tmp_path, prompt_tokens=4, new_tokens=3, rounds=1, threads=1)
    assert result["load_s"] > 0
    assert result["threads"] == 1
    assert seen == {"path": tmp_path, "device": "auto", "threads": 1}


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "rounds"])
def test_counts_below_one_are_refused(tmp_path, name):
    with pytest.raises(OptionError, match=f"{name} is 0"):
        bench(fake_model(tmp_path), **{name: 0})


def test_a_workload_beyond_the_context_is_told_at_once(tmp_path):
    model = fake_model(tmp_path, max_context=16)
    with pytest.raises(ContextError, match=r"prompt of 10 and 7 new tokens .* 16; measure fewer"):
        bench(model, prompt_tokens=10, new_tokens=7)
    assert model.session.read == 0
