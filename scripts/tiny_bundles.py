"""Write bundles of random weights for checks that run in an environment without PyTorch: a chat model and a translator.

python scripts/tiny_bundles.py runs/tiny
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from task_models import make, spec_of, tokenizer
from tiny_bundles import text_assets

from edgellm.models.decoder import Decoder, DecoderConfig
from edgellm_exporters.export import ExportOptions, TextAssets, export


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    text = text_assets()
    config = DecoderConfig(
        vocab_size=320, width=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, mlp_width=64, max_context=4096
    )
    if not (folder / "chat").exists():
        export(Decoder(config).eval(), folder / "chat", options=ExportOptions(), text=text)
    text = TextAssets(tokenizer_json=tokenizer().to_str(), eos_token_ids=(0,), task=spec_of("translation"))
    if not (folder / "translator").exists():
        export(make(), folder / "translator", options=ExportOptions(), text=text)


if __name__ == "__main__":
    main()
