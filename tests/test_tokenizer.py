"""Text survives a tokenizer, begins and ends as its checkpoint says, and streams in letters."""

import io
import json
import os

import pytest
import sentencepiece
from files import REMOVED, edit_json
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from checkpoints import CheckpointError, TextStream, load_tokenizer
from tools.corpus import train_vocabulary
from tools.make_tiny import WORDS

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


KINDS = ["sentencepiece", "byte level", "byte fallback"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    pieces = root / "sentencepiece"
    pieces.mkdir()
    (pieces / "tokenizer.model").write_bytes(train_vocabulary(WORDS, 320))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    write_json(root / "byte level", byte_level(), **named)
    write_json(root / "byte fallback", byte_fallback(), **named)
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
    ids = tokenizer.encode("time the", bos=False)[len(prompt_ids) - (tokenizer.bos_id == 1) :]
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


def test_a_sentencepiece_without_bos_begins_with_nothing(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS.split("\n")),
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
    assert tokenizer.bos_id is None
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
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_corrupt_tokenizer_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: not a"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["directory", "pipe"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
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
        CheckpointError, match=r"no tokenizer.json or tokenizer.model; found vocab.txt"
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
