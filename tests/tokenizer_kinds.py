"""Small tokenizers of every kind of decoder that is met in the field."""

from __future__ import annotations

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers


def sentencepiece(strip: bool) -> Library:
    """Llama 2's form: marks for spaces, bytes for what the vocabulary lacks."""
    words = ["▁", "▁the", "▁a", "e", "t", "h", "▁h", "▁▁", "é", "日", "<", "0", "x"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    vocab |= {w: 259 + i for i, w in enumerate(words)}
    library = Library(models.BPE(vocab, [("▁", "h"), ("▁", "▁")], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    prepend = [normalizers.Prepend("▁")] if strip else []
    library.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return library


def word_piece() -> Library:
    library = Library(models.WordPiece({"[UNK]": 0, "hello": 1, "world": 2, "##s": 3, ",": 4}, unk_token="[UNK]"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return library


def word_level() -> Library:
    library = Library(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2, "there": 3}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return library


def suffixed() -> Library:
    library = Library(models.BPE(end_of_word_suffix="</w>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=60, end_of_word_suffix="</w>", show_progress=False)
    library.train_from_iterator(["hello world there"] * 3, trainer)
    return library


def metaspace() -> Library:
    library = Library(models.Unigram([("<unk>", 0.0), ("▁hello", -1.0), ("▁", -2.0), ("world", -1.5), ("s", -3.0)], 0))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return library
