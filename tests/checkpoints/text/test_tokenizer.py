"""Text survives a tokenizer, begins and ends as its checkpoint says, and streams in letters."""

import base64
import io
import json
import os

import pytest
import sentencepiece
import tiktoken
from files import REMOVED, edit_json
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from checkpoints import CheckpointError, TextStream, load_tokenizer
from tools.corpus import train_vocabulary
from tools.make_tiny import SAMPLE_TEXT

SPECIAL = ["<unk>", "<s>", "</s>"]
STRINGS = [
    "Once upon a time",
    " leading and trailing ",
    "two  spaces, tab\tand\nlines\n\n",
    "Grüße, 模型, привет, naïve, e\u0301",
    "🙂👩‍👩‍👧 🇩🇪",
    "<s> is only text",
    "\N{REPLACEMENT CHARACTER}",
    "",
]
text = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=30)
emoji = st.text(st.sampled_from("🙂👩‍é€模 a"), max_size=30)


def byte_level() -> Library:
    """Every byte a letter, as in GPT-2 and DeepSeek-V3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *alphabet, "Ġt", "he", "Ġthe"]
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    library = Library(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL])
    return library


def byte_fallback() -> Library:
    """Letters where there are some, bytes for the rest, a space in front, as in Llama."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghi", "▁a"]
    library = Library(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL])
    return library


def beginning(library: Library) -> Library:
    """The same, putting the BOS in front itself."""
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return library


def write_json(path, library: Library, **settings):
    path.mkdir(exist_ok=True)
    library.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def write_ranks(path, tokens=("he", " t", " the", "中文"), **settings):
    """A tiktoken.model of all bytes and these tokens, then a BOS, an EOS and a spoken mark."""
    path.mkdir(exist_ok=True)
    ranked = [*(bytes([byte]) for byte in range(256)), *(token.encode() for token in tokens)]
    lines = [b"%s %d" % (base64.b64encode(token), i) for i, token in enumerate(ranked)]
    (path / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    added = {
        str(len(ranked)): {"content": "<s>", "special": True},
        str(len(ranked) + 1): {"content": "</s>", "special": True},
        str(len(ranked) + 9): {"content": "<think>", "special": False},
    }
    settings = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": added} | settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


KINDS = ["sentencepiece", "byte level", "byte fallback", "ranks"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    pieces = root / "sentencepiece"
    pieces.mkdir()
    (pieces / "tokenizer.model").write_bytes(train_vocabulary(SAMPLE_TEXT, 320))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    write_json(root / "byte level", byte_level(), **named)
    write_json(root / "byte fallback", byte_fallback(), **named)
    write_ranks(root / "ranks")
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizers(directories):
    return {kind: load_tokenizer(path) for kind, path in directories.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("string", STRINGS)
def test_decoding_gives_the_text_back(tokenizers, kind, string):
    tokenizer = tokenizers[kind]
    if string.startswith("<s>") and kind != "sentencepiece":
        string = string.removeprefix("<s>")  # which these read as the special token
    assert tokenizer.decode(tokenizer.encode(string)) == string
    assert tokenizer.decode(tokenizer.encode(string, bos=False)) == string
    assert all(0 <= token < tokenizer.vocab_size for token in tokenizer.encode(string))


def streamed(tokenizer, prompt_ids, ids):
    stream = TextStream(tokenizer, prompt_ids)
    return [stream.push(token) for token in ids] + [stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=text | emoji, more=text | emoji, data=st.data())
def test_a_stream_is_the_text_in_whole_characters(tokenizers, kind, prompt, more, data):
    tokenizer = tokenizers[kind]
    prompt_ids = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + more)
    split = data.draw(st.integers(0, len(whole)))
    while tokenizer.decode(whole[:split]).endswith("\N{REPLACEMENT CHARACTER}"):
        split -= 1
    pieces = streamed(tokenizer, whole[:split], whole[split:])
    assert tokenizer.decode(whole[:split]) + "".join(pieces) == tokenizer.decode(whole)
    if "\N{REPLACEMENT CHARACTER}" not in prompt + more:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    own = tokenizer.encode(more, bos=False)
    together = tokenizer.decode([*prompt_ids, *own])
    assert tokenizer.decode(prompt_ids) + "".join(streamed(tokenizer, prompt_ids, own)) == together


@given(st.lists(st.integers(0, 400), max_size=40), text)
def test_a_stream_of_any_ids_is_what_decoding_them_gives(tokenizers, ids, prompt):
    tokenizer = tokenizers["sentencepiece"]
    prompt_ids = tokenizer.encode(prompt)
    told = tokenizer.decode(prompt_ids)
    whole = tokenizer.decode([*prompt_ids, *ids])
    assert told + "".join(streamed(tokenizer, prompt_ids, ids)) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_long_runs_of_bytes_stream_character_by_character(tokenizers, kind):
    tokenizer = tokenizers[kind]
    run = "€" * 50 + "🙂" * 50
    pieces = streamed(tokenizer, tokenizer.encode("a"), tokenizer.encode(run, bos=False)[-350:])
    told = [piece for piece in pieces if piece.strip()]
    assert told == list(run)


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_at_the_end_is_told_when_finished(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("a🙂", bos=False)[:-1]
    pieces = streamed(tokenizer, [], ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces[:-1])
    assert "\N{REPLACEMENT CHARACTER}" in pieces[-1]
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_keeps_its_leading_space(tokenizers, kind):
    tokenizer = tokenizers[kind]
    prompt_ids = tokenizer.encode("time")
    ids = tokenizer.encode("time the", bos=False)[len(prompt_ids) - tokenizer.adds_bos :]
    ids = ids if kind == "sentencepiece" else tokenizer.encode("time the")[len(prompt_ids) :]
    assert "".join(streamed(tokenizer, prompt_ids, ids)) == " the"


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"bos_token": "<s>"}])
def test_sentencepiece_begins_a_text_once_unless_told_not_to(tiny, settings):
    path = tiny()
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = load_tokenizer(path).encode("time")
    assert ids[0] == 1
    assert 1 not in ids[1:]
    assert load_tokenizer(path).encode("") == [1]
    assert load_tokenizer(path).encode("time", bos=False) == ids[1:]
    edit_json(path / "tokenizer_config.json", add_bos_token=False)
    assert load_tokenizer(path).encode("time") == ids[1:]
    assert load_tokenizer(path).bos_id == 1


@pytest.mark.parametrize("token", ["<s>", {"content": "<s>", "lstrip": False}])
@pytest.mark.parametrize(
    "process", [beginning, lambda library: library], ids=["processed", "plain"]
)
@pytest.mark.parametrize("add", [True, False, None])
def test_tokenizer_json_begins_a_text_at_most_once(tmp_path, token, process, add):
    settings = {"bos_token": token} if add is None else {"bos_token": token, "add_bos_token": add}
    tokenizer = load_tokenizer(write_json(tmp_path, process(byte_level()), **settings))
    begun = process is beginning if add is None else add
    assert tokenizer.encode("the").count(1) == begun
    assert tokenizer.encode("the")[:1] == [1] or not begun
    assert tokenizer.encode("the", bos=False).count(1) == 0
    assert tokenizer.encode("") == [1] * begun
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (1, begun)


def test_a_sentencepiece_without_bos_begins_with_nothing(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE_TEXT.split("\n")),
        model_writer=model,
        vocab_size=60,
        model_type="char",
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (None, False)
    assert tokenizer.stop_ids == ()
    assert tokenizer.encode("") == []
    assert tokenizer.decode(tokenizer.encode("the king")) == "the king"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (5, 6, (5,)),
        ([5, 7], 6, (5, 7)),
        (None, [6, 8], (6, 8)),
        (REMOVED, 6, (6,)),
        (REMOVED, 0, (0,)),
        (0, 6, (0,)),
        (REMOVED, REMOVED, (2,)),
        ([], None, (2,)),
    ],
)
def test_generation_config_then_config_then_the_tokenizer_say_where_to_stop(
    tiny, generation, config, expected
):
    path = tiny()
    (path / "generation_config.json").write_text("{}")
    edit_json(path / "generation_config.json", eos_token_id=generation)
    edit_json(path / "config.json", eos_token_id=config)
    assert load_tokenizer(path).stop_ids == expected


def test_the_tokenizer_config_names_the_stop_token(tmp_path):
    path = write_json(tmp_path, byte_level(), eos_token={"content": "</s>"})
    assert load_tokenizer(path).stop_ids == (2,)
    assert load_tokenizer(write_json(tmp_path, byte_level())).stop_ids == ()


@pytest.mark.parametrize("value", ["2", 2.0, True, -1, [2, "3"], {"id": 2}])
def test_a_stop_id_that_is_none_is_refused(tiny, value):
    path = tiny()
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(
        CheckpointError, match=r"generation_config.json: eos_token_id .* is not a tok"
    ):
        load_tokenizer(path)


CORRUPT = [
    b"",
    b"\x00" * 100,
    b"not a tokenizer",
    b"{}",
    b'{"model": {"type": "BPE"}}',
    b"\xff\xfe",
]


@pytest.mark.parametrize("content", CORRUPT)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tiktoken.model"])
def test_a_corrupt_tokenizer_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: not a"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["directory", "pipe"])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "tiktoken.model", "tokenizer_config.json"]
)
def test_only_regular_files_are_read(tiny, make, name):
    path = tiny()
    (path / name).unlink(missing_ok=True)
    make(path / name)
    with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
def test_a_corrupt_setting_is_named(tiny, name):
    path = tiny()
    (path / name).write_text("{")
    with pytest.raises(CheckpointError, match=f"{name}: not JSON"):
        load_tokenizer(path)


def test_a_directory_without_tokenizer_says_what_it_holds(tmp_path):
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(
        CheckpointError,
        match=r"no tokenizer.json, tokenizer.model or tiktoken.model; found vocab.txt",
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere: no such directory"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_no_text(tokenizers, kind):
    with pytest.raises(ValueError, match=r"half a surrogate pair at position 2"):
        tokenizers[kind].encode("ab\ud83dc")


def test_ids_are_below_the_size_even_with_gaps(tmp_path):
    pieces = {"a": 0, "b": 1, "far": 40}
    library = Library(models.BPE(pieces, []))
    assert load_tokenizer(write_json(tmp_path, library)).vocab_size == 41


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_stop_id_beyond_the_vocabulary_is_refused(tiny, file):
    path = tiny()
    (path / "generation_config.json").write_text("{}")
    edit_json(path / "config.json", vocab_size=384)  # the tokenizer has 320
    edit_json(path / file, eos_token_id=[2, 383])
    assert load_tokenizer(path).stop_ids == (2, 383)
    edit_json(path / file, eos_token_id=[2, 384])
    with pytest.raises(CheckpointError, match=f"{file}: eos_token_id 384 is .* 0 to 383"):
        load_tokenizer(path)
    edit_json(path / "config.json", vocab_size=REMOVED)
    edit_json(path / file, eos_token_id=320)
    with pytest.raises(CheckpointError, match=f"{file}: eos_token_id 320 is .* 0 to 319"):
        load_tokenizer(path)


def test_what_training_cut_and_filled_up_is_not(tmp_path):
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=8)
    tokenizer = load_tokenizer(write_json(tmp_path, library))
    for string in ("a", "a long text"):
        assert tokenizer.decode(tokenizer.encode(string)) == string
    assert len(tokenizer.encode("a")) == 1


def train_prefixed() -> bytes:
    """A model that puts a space before a text, and takes the first away when it decodes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE_TEXT.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
    )
    return model.getvalue()


def test_tokens_are_added_to_a_sentencepiece_model(tiny):
    path = tiny()
    added = {
        "1": {"content": "<s>", "special": True},
        "320": {"content": "<|im_end|>", "special": True},
        "322": {"content": "<think>", "special": False},
    }
    settings = {"added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    edit_json(path / "config.json", eos_token_id=REMOVED)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.stop_ids) == (323, (320,))
    king, night = (tokenizer.encode(text, bos=False) for text in ("the king", " night"))
    ids = [1, *king, 320, *night, 322, *night, 321, 400]
    assert tokenizer.decode(ids) == "the king night<think> night"
    (path / "tokenizer.model").write_bytes(train_prefixed())
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode([*tokenizer.encode("king"), 322, *tokenizer.encode("king")]) == (
        "king<think> king"
    )


@pytest.mark.parametrize(
    "added",
    [
        {"x": {"content": "<a>"}},
        {"-1": {"content": "<a>"}},
        {"1" * 5000: {"content": "<a>"}},
        {"300": {"content": ""}},
        {"300": {"content": 1}},
        {"300": "<a>"},
        ["<a>"],
        5,
    ],
)
def test_added_tokens_that_are_none_are_refused(tiny, tmp_path, added):
    for path in (tiny(), write_ranks(tmp_path / "ranks")):
        (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        with pytest.raises(CheckpointError, match=r"tokenizer_config.json: added_tokens_decoder"):
            load_tokenizer(path)


KIMI = (
    r"[\p{Han}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WHOLE_WORDS = [
    "the",
    " the",
    "中",
    "中文",
    "文E",
    "don't",
    "'t",
    "123",
    "1234",
    "\n\n",
    "  ",
    " ?",
    "Ab",
]
mixed = st.lists(
    st.sampled_from([*WHOLE_WORDS, *"the 中文EAb'L1234\n\r \t?!é\u0301"])
    | st.text(st.characters(codec="utf-8"), max_size=3)
).map("".join)


@given(mixed)
def test_ranks_split_and_merge_as_published(tokenizers_of_words, string):
    tokenizer, independent = tokenizers_of_words
    ids = tokenizer.encode(string)
    assert ids == independent.encode_ordinary(string)
    assert tokenizer.decode(ids) == string


@pytest.fixture(scope="module")
def tokenizers_of_words(tmp_path_factory):
    """Ours, and tiktoken's with the published pattern; the words show where text was split."""
    words = sorted({word[:cut] for word in WHOLE_WORDS for cut in range(1, len(word) + 1)}, key=len)
    words = [word for word in words if len(word.encode()) > 1]
    tokenizer = load_tokenizer(write_ranks(tmp_path_factory.mktemp("words"), words))
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {word.encode(): 256 + i for i, word in enumerate(words)}
    return tokenizer, tiktoken.Encoding(
        "test", pat_str=KIMI, mergeable_ranks=ranks, special_tokens={}
    )


def test_ranks_end_in_named_and_reserved_tokens(tmp_path):
    tokenizer = load_tokenizer(write_ranks(tmp_path))
    assert tokenizer.vocab_size == 260 + 256
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.stop_ids) == (260, False, (261,))
    assert tokenizer.encode("<s>the<|reserved_token_300|><think>")[0] == 260
    assert tokenizer.encode("<s>the<|reserved_token_300|><think>")[-2:] == [300, 269]
    assert tokenizer.decode([260, 116, 256, 300, 269, 515, 516, 9999]) == "the<think>"
    assert load_tokenizer(write_ranks(tmp_path, add_bos_token=True)).encode("the")[0] == 260


def test_ranks_survive_runs_that_tiktoken_does_not(tokenizers):
    for run in (" " * 1_000_000, "a" * 60_000 + " " * 60_000 + "\n" * 60_000 + "b"):
        assert tokenizers["ranks"].decode(tokenizers["ranks"].encode(run)) == run


BROKEN_RANKS = [
    (lambda raw: raw.replace(b"\n", b"\n\xff 5\n", 1), "line 2 is"),
    (lambda raw: raw + b"aGVsbG8= x\n", "line 261 is"),
    (lambda raw: raw + b"aGVsbG8=\n", "line 261 is"),
    (lambda raw: raw + b"aGVsbG8= 261\n", "the ranks of its 261 tokens are not 0 to 260"),
    (lambda raw: raw + b"aGVsbG8= 259\n", "the ranks of its 261 tokens"),
    (lambda raw: raw + raw.splitlines()[-1] + b"\n", "the ranks of its 261 tokens"),
    (lambda raw: raw.replace(b"AA== 0", b"aGVsbG8= 0"), "it lacks some of the 256 bytes"),
    (lambda raw: b"\n".join(raw.splitlines()[:-1]), "with its 259 ranks, added tokens are 259 to"),
    (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "line 1 is"),
]


@pytest.mark.parametrize(("spoil", "said"), BROKEN_RANKS, ids=[said for _, said in BROKEN_RANKS])
def test_broken_ranks_are_named(tmp_path, spoil, said):
    file = write_ranks(tmp_path) / "tiktoken.model"
    file.write_bytes(spoil(file.read_bytes()))
    if said.startswith("with"):
        added = {"515": {"content": "[PAD]"}}
        edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=added)
    with pytest.raises(CheckpointError, match=f"tiktoken.model: .*{said}"):
        load_tokenizer(tmp_path)


def test_two_added_tokens_of_one_name_are_refused(tmp_path):
    added = {"260": {"content": "<a>"}, "261": {"content": "<a>"}}
    with pytest.raises(CheckpointError, match="two added tokens of one name"):
        load_tokenizer(write_ranks(tmp_path, added_tokens_decoder=added))
