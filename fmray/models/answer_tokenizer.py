"""A small tokenizer for a decoder that starts from scratch: byte-level BPE learned from the answers it will give."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FROM_ANSWERS = "answers"
"""What a configuration writes for such a tokenizer."""
END = "<|end|>"


def learn_tokenizer(answers: Iterable[str], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Frequent answers become single tokens; any other text can still be spelled, byte by byte.

    The same answers give the same tokenizer. It has 257 tokens at least: all bytes, and one that starts and ends an answer.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(answers, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)
