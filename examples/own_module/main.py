"""Train, export, prove and run a model that edgellm has never seen: python examples/own_module/main.py."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from model import RetentionConfig, RetentionModel
from rich.console import Console

from edgellm.training import END_OF_TEXT, Corpus, Reporter, TrainOptions, prepare_tokens, train, train_tokenizer
from edgellm_exporters.export import ExportOptions, TextAssets, export
from edgellm_runtime import load

TEXT = Path(__file__).parents[1] / "data" / "tinyshakespeare.txt"


def main() -> None:
    arguments = parse()
    corpus = Corpus(files=[arguments.text])
    tokenizer = train_tokenizer(corpus.train(), vocab_size=512)
    data = prepare_tokens(corpus, tokenizer, arguments.out / "tokens")

    torch.manual_seed(0)
    model = RetentionModel(RetentionConfig(vocab_size=tokenizer.get_vocab_size()))
    options = TrainOptions(
        steps=arguments.steps, batch_size=8, context=96, warmup=arguments.steps // 10, eval_every=100, threads=2
    )
    with Reporter(Console(stderr=True)) as report:
        result = train(
            model, data, options, arguments.out / "run", architecture="own", tokenizer=tokenizer, on_progress=report
        )
    print(f"validation {result.val_loss:.3f} nats a token; token frequencies alone give {result.unigram_entropy:.3f}")

    end = tokenizer.encode(END_OF_TEXT).ids[0]
    text = TextAssets(tokenizer_json=tokenizer.to_str(), eos_token_ids=(end,))
    for target, quantize in (("onnx", "none"), ("cpu", "none"), ("cpu", "int8")):
        bundle = arguments.out / f"{target}-{quantize}"
        made = export(model, bundle, options=ExportOptions(target=target, quantize=quantize), text=text)
        print(f"\n{bundle}: {made.bundle.nbytes / 1e6:.2f} MB")
        for check in made.verification.checks:
            print(f"  {check.name:>7} {check.value:9.2g}, bound {check.bound:.2g}: {check.what}")
        answer = load(bundle, threads=2).generate(
            "ROMEO:\n", max_new_tokens=60, temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=1
        )
        print("  " + answer.text.strip().replace("\n", "\n  "))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train, export, prove and run a model of your own.")
    parser.add_argument("--text", type=Path, default=TEXT, help="what to train on")
    parser.add_argument("--steps", type=int, default=300, help="updates")
    parser.add_argument("--out", type=Path, default=Path("runs/own-module"), help="a new folder for all that is made")
    return parser.parse_args()


if __name__ == "__main__":
    main()
