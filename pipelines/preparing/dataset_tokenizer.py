"""The tokenizer of a prepared dataset: the encoder's own, or one trained on the training split."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from upath import UPath

from cluster.store import upload_tree
from models.architectures import SHIFTED
from models.settings import InputError
from pipelines.locate import reason_of
from pipelines.preparing.tokenising import TokenizerSettings
from pipelines.pretrained import encoder_folder

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


_SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
"""T5's names of dropped spans."""


def copy_tokenizer(
    encoder: str, max_length: int, out: UPath, scratch: Path, setting: str = "prepare.max_length", of: str = "finetune"
) -> None:
    """Puts the encoder's tokenizer into `out`, as `AutoTokenizer` loads it.

    `setting` is where the recipe says `max_length`, and `of` the section that names the encoder.

    Raises:
        InputError: there is no such encoder, or its positions or its tokenizer end before `max_length`.
    """
    with encoder_folder(encoder) as name:
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # of `tokenizers`, bare ones
            raise InputError(
                f"{of}.encoder: {encoder} has no tokenizer that can be loaded: {reason_of(error)}."
            ) from error
    if not tokenizer.is_fast:
        raise InputError(f"{of}.encoder: {encoder} has no tokenizer of the `tokenizers` library.")
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if config.model_type in SHIFTED:
        positions -= 2  # numbered from the padding's index on
    longest = min(int(positions), int(tokenizer.model_max_length))
    if max_length > longest:
        raise InputError(f"{setting} is {max_length}, but the encoder {encoder} takes at most {longest} tokens.")
    tokenizer.save_pretrained(scratch)
    upload_tree(scratch, out)


def train_tokenizer(
    settings: TokenizerSettings,
    max_length: int,
    texts: list[str],
    out: UPath,
    scratch: Path,
    *,
    sentinels: bool = False,
) -> int:
    """Trains a tokenizer and puts it into `out`, as `AutoTokenizer` loads it: [CLS] text [SEP], pairs as in BERT.

    Gives the size of its vocabulary, which is smaller than wanted where the texts give no more. `sentinels`: T5's
    <extra_id_0> to <extra_id_99> come on top. Equal texts give an equal tokenizer, but for a unigram model: its trainer
    adds floating-point numbers in the order of a randomly seeded hash table, so that no two runs agree.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    train = {"wordpiece": _train_wordpiece, "bpe": _train_bpe, "unigram": _train_unigram}[settings.kind]
    tokenizer = train(settings, texts)
    size: int = tokenizer.get_vocab_size()
    extra = list(_SENTINELS) if sentinels else []
    tokenizer.add_special_tokens(extra)
    marks = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        extra_special_tokens=extra,
    ).save_pretrained(scratch)
    upload_tree(scratch, out)
    return size


def _train_unigram(settings: TokenizerSettings, texts: list[str]) -> Tokenizer:
    """SentencePiece's (Kudo 2018, arXiv 1804.10959)."""
    tokenizer = Tokenizer(models.Unigram())
    steps = [normalizers.NFKC(), *([normalizers.Lowercase()] if settings.lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=settings.vocabulary, special_tokens=_SPECIAL, unk_token="[UNK]", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_bpe(settings: TokenizerSettings, texts: list[str]) -> Tokenizer:
    """Byte-level, as GPT-2's: nothing is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    if settings.lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_wordpiece(settings: TokenizerSettings, texts: list[str]) -> Tokenizer:
    """As BERT's. At most three quarters of the vocabulary are single characters, the most frequent ones, unless the
    texts have too few longer pieces to fill the rest, as in Chinese, where each character is a word.

    The trainer numbers the characters inside words (##a) in the order of a randomly seeded hash table, and merges
    that are equally frequent by these numbers. So it is first asked for these characters alone, and then given
    them in order, as if they were special tokens, to train.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=settings.lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def train(vocabulary: int, known: list[str], alphabet: list[str]) -> dict[str, int]:
        limits: dict[str, Any] = {"limit_alphabet": len(alphabet)} if alphabet else {}
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocabulary,
            special_tokens=[*_SPECIAL, *known],
            initial_alphabet=alphabet,
            show_progress=False,
            **limits,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer.get_vocab()

    singles = set(train(0, [], [])) - set(_SPECIAL)
    known = sorted(single for single in singles if not single.startswith("##") or single == "##")

    def learn(most: int) -> dict[str, int]:
        """The vocabulary, of which at most so many are single characters."""
        alphabet, chosen = known, singles
        if len(singles) > most:
            counts = Counter(character for text in texts for character in tokenizer.normalizer.normalize_str(text))
            inside = len(singles) - len(known)
            ranked = sorted(known, key=lambda character: (-counts[character], character))
            alphabet = sorted(ranked[: max(most - inside, most // 2)])
            chosen = set(train(0, [], alphabet)) - set(_SPECIAL)
        continuing = sorted(single for single in chosen if single.startswith("##") and single != "##")
        return train(settings.vocabulary, continuing, alphabet)

    most = settings.vocabulary * 3 // 4
    vocabulary = learn(most)
    if (left := settings.vocabulary - len(vocabulary)) > 0 and len(singles) > most:
        vocabulary = learn(most + left)
    trained = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    trained.decoder = decoders.WordPiece()
    trained.add_special_tokens(_SPECIAL)
    return trained
