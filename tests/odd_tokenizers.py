"""Small tokenizers of the kinds that treat the start, the spaces and the letters of a text each in its own way."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

MARKERS = ["<|im_start|>", "<|im_end|>"]
TEXT = sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:'!?#<>/[]|_ "})


def wrapped(tokenizer, adds_bos=False, **options):
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", *MARKERS)])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["<s>", "$A"], special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


def spelling_tokenizer(**options):
    """Byte-level without merges: every byte is a token, so that expected lists can be written out."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, **options)


def sentencepiece_tokenizer(scheme, **options):
    """Llama 2's kind: a space before a text ("legacy": before every piece of text between special tokens)."""
    tokens = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *(char for char in TEXT if char != " ")]
    words = ["▁H", "▁U", "▁▁", "ll"]  # merges across the place where a space is put in front
    merges = [("▁", "H"), ("▁", "U"), ("▁", "▁"), ("l", "l")]
    vocab = {token: n for n, token in enumerate([*tokens, *words])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer, **options)


def lossy_tokenizer():
    """Lower-cases and throws white space away: ids can't be read back, prompts must still be prefixes."""
    vocab = {token: n for n, token in enumerate(["<unk>", *sorted({char.lower() for char in TEXT} - {" "})])}
    vocab |= {f"##{token}": len(vocab) + n for n, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return wrapped(tokenizer, unk_token="<unk>")
