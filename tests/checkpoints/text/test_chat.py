"""A conversation is written as its template says, by a process that can do no harm, and what people
say in it stays text."""

import ast
import base64
import io
import json
import subprocess
import sys
import unicodedata
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import sentencepiece
from files import REMOVED, edit_json
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

import checkpoints.text.chat
import checkpoints.text.template
from checkpoints import CheckpointError, load_tokenizer
from checkpoints.text.chat import Template, render
from tools.make_tiny import SAMPLE_TEXT

CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("message.content", "message.content | trim")
THOUGHTLESS = CHATML.replace("message.content", "message.content.split('</think>')[-1]")

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
MARKERS = ["<|im_start|>", "<|im_end|>"]
THOUGHTS = ["<think>", "</think>"]  # structural, though not flagged special
CONTROL = [UNKNOWN, BOS, EOS, *MARKERS, *THOUGHTS]
NAMED = {"bos_token": BOS, "eos_token": {"content": EOS}, "unk_token": UNKNOWN}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def with_added_tokens(library: Library) -> Library:
    library.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL[:-2]]
    )
    library.add_tokens([AddedToken(token, normalized=True) for token in THOUGHTS])
    return library


def with_spaces(library: Library) -> Library:
    """With white space among the added tokens, to save tokens."""
    library.add_tokens([AddedToken(space, normalized=False) for space in ("  ", "\n\n")])
    return library


def byte_level() -> Library:
    """As in DeepSeek and Qwen; one of the control tokens can also be merged from letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "m"), ("|", ">"), ("u", "s")]
    merges += [("<", "s"), ("<s", ">"), ("<s>", "e")]
    pieces = [*alphabet, *map("".join, merges)]
    library = Library(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return with_spaces(with_added_tokens(library))


def composing() -> Library:
    """With a normalizer that makes ASCII of full-width letters."""
    library = byte_level()
    library.normalizer = normalizers.NFKC()
    return library


def spaced_decoder():
    return decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def likeliest() -> Library:
    """Unigram pieces behind a space marker; the control tokens are in the model's vocabulary."""
    words = ["▁", *"abcdehimnorstu", "▁the", "us", "er", "im"]
    scored = [(token, 0.0) for token in [*CONTROL, *BYTES]]
    scored += [(word, -3.0 if len(word) == 1 else -4.0) for word in words]
    library = Library(models.Unigram(scored, unk_id=0, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    library.decoder = spaced_decoder()
    return with_spaces(with_added_tokens(library))


def prefixed() -> Library:
    """A space before every stretch of text, as in Llama 2's and Mixtral's tokenizer.json."""
    pieces = [UNKNOWN, BOS, EOS, *BYTES, *"▁abcdefghistu|>", "▁t", "he", "▁the", "us"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("u", "s")]
    library = Library(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            unk_token=UNKNOWN,
            byte_fallback=True,
        )
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = spaced_decoder()
    return with_added_tokens(library)


LIBRARIES = {
    "byte level": byte_level,
    "composing": composing,
    "likeliest": likeliest,
    "prefixed": prefixed,
}


def pieces_of(**settings) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE_TEXT.split("\n")),
        model_writer=model,
        **{
            "model_type": "bpe",
            "vocab_size": 340,
            "byte_fallback": True,
            "control_symbols": MARKERS,
            "user_defined_symbols": ["<think>", "\n\n", "#"],
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "minloglevel": 2,
        }
        | settings,
    )
    return model.getvalue()


def rank_file() -> bytes:
    tokens = [bytes([byte]) for byte in range(256)] + [b" t", b"he", b" the", b"<|", b"<|im"]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens))


KINDS = [*LIBRARIES, "sentencepiece", "ranks"]


def write_chat(path: Path, kind: str, template: str | None = CHATML, **settings) -> Path:
    """A directory with a tokenizer of that kind, and a chat template."""
    path.mkdir(exist_ok=True)
    added: dict[int, str] = {}
    if kind in LIBRARIES:
        LIBRARIES[kind]().save(str(path / "tokenizer.json"))
    elif kind == "sentencepiece":
        (path / "tokenizer.model").write_bytes(pieces_of())
        added = {1: BOS, 340: "</think>"}
    else:
        (path / "tiktoken.model").write_bytes(rank_file())
        added = {261 + i: token for i, token in enumerate(CONTROL)}
    listed = {
        str(i): {"content": token, "special": token not in THOUGHTS} for i, token in added.items()
    }
    config = NAMED | {"added_tokens_decoder": listed} | settings
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    return {kind: write_chat(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizers(directories):
    return {kind: load_tokenizer(path) for kind, path in directories.items()}


def llama(model: bytes) -> LlamaTokenizer:
    """transformers' own reading of a sentencepiece model, for which it would need protobuf."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    learned = [piece for piece in ids if processor.get_score(ids[piece]) < 0 or piece == "▁t"]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in learned
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    tokenizer = LlamaTokenizer(vocab=ids, merges=merges)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in MARKERS])
    extra = ["<think>", "\n\n", "#", "</think>"]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in extra])
    return tokenizer


@pytest.fixture(scope="module")
def oracles(directories):
    """The tokenizers of transformers, of the same files."""
    found = {
        kind: PreTrainedTokenizerFast(tokenizer_file=str(directories[kind] / "tokenizer.json"))
        for kind in LIBRARIES
    }
    found["sentencepiece"] = llama(pieces_of())
    for tokenizer in found.values():
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token = BOS, EOS, UNKNOWN
    return found


@contextmanager
def rendering_here():
    """Render in this process, for tests with many conversations."""

    def run(command, input, **options):
        request = json.loads(input)
        arguments = [request[key] for key in ("template", "variables", "characters")]
        reply = json.dumps({"text": checkpoints.text.template.render(*arguments)})
        return subprocess.CompletedProcess(command, 0, reply.encode())

    with mock.patch.object(subprocess, "run", run):
        yield


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


ROLES = ["system", "user", "assistant"]
letters = st.characters(codec="utf-8", exclude_characters="▁")
words = st.sampled_from([" ", "  ", "\n", "\n\n", "\t", " the", "#", "<|", "|>", "</s", "us"])
plain = st.lists(words | st.text(letters, max_size=5), max_size=8).map("".join)


def says_no_control(text: str) -> bool:
    return not any(token in unicodedata.normalize("NFKC", text) for token in CONTROL)


@pytest.mark.parametrize("template", [CHATML, TRIMMED])
@pytest.mark.parametrize("kind", [*LIBRARIES, "sentencepiece"])
@given(contents=st.lists(plain.filter(says_no_control), min_size=1, max_size=4))
def test_ids_are_those_of_transformers(tokenizers, oracles, kind, template, contents):
    messages = [{"role": ROLES[i % 3], "content": text} for i, text in enumerate(contents)]
    expected = oracles[kind].apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, return_dict=False
    )
    tokenizer = tokenizers[kind]
    with rendering_here(), mock.patch.object(tokenizer.templates, "find") as found:
        found.return_value = Template(template, "here")
        assert tokenizer.chat(messages) == expected
    assert expected.count(tokenizer.vocabulary.find(BOS)) == 1


@pytest.mark.parametrize("kind", KINDS)
@given(text=plain.filter(says_no_control))
def test_a_conversation_that_begins_with_text_begins_as_a_text_does(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    with rendering_here(), mock.patch.object(tokenizer.templates, "find") as found:
        found.return_value = Template("{{ messages[0].content }}{{ eos_token }}", "here")
        ids = tokenizer.chat(user(text))
    assert ids == [*tokenizer.encode(text, bos=False), tokenizer.vocabulary.find(EOS)]


def control_ids(tokenizer, ids):
    """The control tokens among the ids, but for what unknown letters become."""
    wanted = [tokenizer.vocabulary.find(token) for token in CONTROL if token != UNKNOWN]
    assert None not in wanted
    return [token for token in ids if token in wanted]


FULL_WIDTH = "".join(chr(ord(letter) + 0xFEE0) for letter in "<|im_end|>")
MARK = chr(0xFDD0)  # what conversations are marked with, if it is free
SHARDS = ["<", "|>", "<|im", "_end|>", "<|", "s>", "</", "think>", "<<", "▁", "us", "im"]
pieces = st.sampled_from([*CONTROL, *CONTROL, *SHARDS, FULL_WIDTH, MARK, " ", "\n", "  "])
forged = st.lists(pieces | st.text(max_size=3), max_size=8).map("".join)
HOLE = "QQ"


def written(kind: str, text: str) -> str:
    """What the tokenizer can give back of a text."""
    if kind == "composing":
        text = unicodedata.normalize("NFKC", text)
    return text if kind in ("byte level", "composing", "ranks") else text.replace("▁", " ")


@pytest.mark.parametrize("template", [CHATML, TRIMMED, THOUGHTLESS])
@pytest.mark.parametrize("kind", KINDS)
@given(contents=st.lists(forged, min_size=1, max_size=4))
def test_what_looks_like_a_control_token_in_a_message_stays_text(
    tokenizers, kind, template, contents
):
    tokenizer = tokenizers[kind]
    shown = [text.strip() if template == TRIMMED else text for text in contents]
    if template == THOUGHTLESS:
        shown = [text.split("</think>")[-1] for text in contents]
    with rendering_here(), mock.patch.object(tokenizer.templates, "find") as found:
        found.return_value = Template(template, "here")
        ids = tokenizer.chat([turn for text in contents for turn in user(text)])
        harmless = tokenizer.chat([turn for _ in contents for turn in user(HOLE)])
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, harmless)
    frame = tokenizer.decode(harmless).split(HOLE)
    expected = "".join(a + b for a, b in zip(frame, [*shown, ""], strict=True))
    assert written(kind, tokenizer.decode(ids)) == written(kind, expected)


def test_a_message_in_compatible_letters_stays_text_too(tmp_path):
    path = write_chat(tmp_path, "sentencepiece")
    model = pieces_of(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    (path / "tokenizer.model").write_bytes(model)
    tokenizer = load_tokenizer(path)
    full_width = "".join(chr(ord(letter) + 0xFEE0) for letter in "<think>")
    assert tokenizer.vocabulary.find("<think>") in tokenizer.vocabulary.encode(full_width, False)
    ids = tokenizer.chat(user(f"the {full_width}<think>  king"))
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, tokenizer.chat(user("king")))
    assert tokenizer.decode(ids).startswith("user the <think><think>  king ")


def test_tokens_that_overlap_are_all_kept_apart(tmp_path):
    path = write_chat(tmp_path, "sentencepiece")
    (path / "tokenizer.model").write_bytes(pieces_of(user_defined_symbols=["<ab>", "b>cd"]))
    tokenizer = load_tokenizer(path)
    overlapping = [tokenizer.vocabulary.find(token) for token in ("<ab>", "b>cd")]
    ids = tokenizer.chat(user("<ab>cd"))
    assert not set(overlapping) & set(ids)
    assert "<ab>cd" in tokenizer.decode(ids)


def test_of_two_tokens_the_longer_is_read(tmp_path):
    path = write_chat(tmp_path, "byte level", "<s><s>><s>")
    library = with_added_tokens(byte_level())
    library.add_special_tokens(["<s>>"])
    library.save(str(path / "tokenizer.json"))
    short, long = library.token_to_id("<s>"), library.token_to_id("<s>>")
    assert load_tokenizer(path).chat([]) == [short, long, short]


@pytest.mark.parametrize("kind", KINDS)
def test_a_role_stays_text_too(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = tokenizer.chat([{"role": "user<|im_end|>", "content": "the"}])
    assert len(control_ids(tokenizer, ids)) == 4
    assert "user<|im_end|>\nthe" in tokenizer.decode(ids)


def test_what_a_template_writes_around_a_message_stays_its_own(tmp_path):
    source = (
        "<think>{{ messages[0].content.split('<think>')[-1] }}</think>{{ messages[1].content }}"
    )
    tokenizer = load_tokenizer(write_chat(tmp_path, "byte level", source))
    ids = tokenizer.chat([*user("a<think>"), *user("<s>b</s>")])
    expected = [tokenizer.vocabulary.find(token) for token in THOUGHTS]
    assert control_ids(tokenizer, ids) == expected
    assert tokenizer.decode(ids) == "<think></think><s>b</s>"


def test_letters_that_a_tokenizer_does_not_know_are_unknown(tmp_path):
    path = write_chat(tmp_path, "byte level", "{{ eos_token }}{{ messages[0].content }}")
    library = Library(models.BPE({UNKNOWN: 0, "a": 1, EOS: 2}, [], unk_token=UNKNOWN))
    library.add_special_tokens([UNKNOWN, EOS])
    library.save(str(path / "tokenizer.json"))
    assert load_tokenizer(path).chat(user("aéa")) == [2, 1, 0, 1]


def test_every_noncharacter_in_a_message_is_too_many(tokenizers):
    everything = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    ids = tokenizers["byte level"].chat(user(everything[2:] + "<s>"))
    assert everything[2:] + "<s>" in tokenizers["byte level"].decode(ids)
    with pytest.raises(ValueError, match=r"fewer than two of U\+FDD0 to U\+FDEF are free"):
        tokenizers["byte level"].chat(user(everything[1:]))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "the messages are a str, expected a list"),
        ({"role": "user", "content": "a"}, "the messages are a dict"),
        (["hello"], r"messages\[0\]: expected a dict of role and content, found str"),
        ([{"role": "user"}], r"messages\[0\]: .* found \['role'\]"),
        ([{"role": "user", "content": "a", "name": "b"}], r"found \['role', 'content', 'name'\]"),
        (
            [*user("a"), {"role": "user", "content": None}],
            r"messages\[1\]: the content is a NoneType",
        ),
        ([{"role": 1, "content": "a"}], r"messages\[0\]: the role is a int, expected a string"),
        (
            user("ab\ud83dc"),
            r"the content of messages\[0\] has half a surrogate pair at position 2",
        ),
    ],
)
def test_messages_that_are_none_are_refused(tokenizers, messages, said):
    with pytest.raises(ValueError, match=said):
        tokenizers["ranks"].chat(messages)


def said_by(path: Path, template: str | None = None) -> str:
    tokenizer = load_tokenizer(path)
    return tokenizer.decode(tokenizer.chat(user("hi"), template))


NAMED_TEMPLATES = [
    {"name": "tool_use", "template": "tools"},
    {"name": "default", "template": "one"},
]


def test_the_template_is_in_its_file_or_in_the_tokenizer_config(tmp_path):
    path = write_chat(tmp_path, "byte level", "file", chat_template="config")
    assert said_by(path) == said_by(path, "default") == "file"
    (path / "chat_template.jinja").unlink()
    assert said_by(path) == "config"
    edit_json(path / "tokenizer_config.json", chat_template=NAMED_TEMPLATES)
    assert said_by(path) == said_by(path, "default") == "one"
    assert said_by(path, "tool_use") == "tools"
    with pytest.raises(
        CheckpointError, match="no chat template named rag; it has tool_use, default"
    ):
        said_by(path, "rag")
    edit_json(path / "tokenizer_config.json", chat_template=NAMED_TEMPLATES[:1])
    with pytest.raises(CheckpointError, match="no chat template named default; it has tool_use"):
        said_by(path)


@pytest.mark.parametrize("value", [REMOVED, None, []])
def test_a_model_without_template_says_so(tmp_path, value):
    path = write_chat(tmp_path, "byte level", None)
    edit_json(path / "tokenizer_config.json", chat_template=value)
    with pytest.raises(CheckpointError, match=f"{path}: no chat template, neither a chat_temp"):
        said_by(path)
    assert load_tokenizer(path).encode("the")


@pytest.mark.parametrize(
    "value", [1, {"default": "x"}, ["x"], [{"name": "a"}], [{"name": 1, "template": "a"}]]
)
def test_a_template_that_is_none_is_refused_when_it_is_needed(tmp_path, value):
    path = write_chat(tmp_path, "byte level", None, chat_template=value)
    assert load_tokenizer(path).encode("the")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: chat_template = .*expected"):
        said_by(path)


def test_a_template_file_that_cannot_be_read_is_named_when_it_is_needed(tmp_path):
    path = write_chat(tmp_path, "byte level", None)
    (path / "chat_template.jinja").write_bytes(b"\xff")
    assert load_tokenizer(path).encode("the")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: not UTF-8"):
        said_by(path)
    (path / "chat_template.jinja").unlink()
    (path / "chat_template.jinja").mkdir()
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: not a regular file"):
        said_by(path)


def test_special_tokens_are_known_by_name(tmp_path):
    source = "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ add_bos_token }}"
    tokenizer = load_tokenizer(write_chat(tmp_path, "byte level", source, pad_token="[nowhere]"))
    found = map(tokenizer.vocabulary.find, [BOS, EOS, UNKNOWN])
    assert tokenizer.chat([]) == list(found)


def test_a_sentencepiece_model_names_its_ends_itself(tiny):
    path = tiny()
    (path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}")
    assert load_tokenizer(path).chat([]) == [1, 2]


WRITTEN_FOR_TRANSFORMERS = [
    CHATML,
    "{% if tools is not none %}tools{% endif %}{% if documents is not none %}more{% endif %}",
    "a  \n  {% if true %}\n b\n  {% endif %}\n  {{ messages[0].content | tojson }}\n",
    "{{ messages | tojson(indent=2) }}{{ {'b': 'é', 'a': 1} | tojson(sort_keys=True) }}",
    "{{ [1, 2] | tojson(separators=(',', ':')) }}{{ 'é<' | tojson(ensure_ascii=True) }}",
    "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}"
    "{{ x }}{% endfor %}",
    "{% for i in range(9) %}{% if i == 3 %}{% break %}{% elif i == 1 %}{% continue %}{% endif %}"
    "{{ i }}{% endfor %}",
    "{% set ns = namespace(n=1) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}"
    "{{ ns.n }}{{ namespace({'a': 2}).a }}{{ dict(a=1) }}",
    "{{ strftime_now('%Y') }}{{ messages[0].nothing }}{{ messages[0].content.__class__ }}",
    "{%- macro say(text) -%}[{{ text | upper }}]{%- endmacro -%}{{ say(messages[0]['content']) }}",
]


@pytest.mark.parametrize("source", WRITTEN_FOR_TRANSFORMERS)
def test_templates_mean_what_they_mean_to_transformers(source):
    messages = [*user(" Grüße <b> "), {"role": "assistant", "content": "'\n'"}]
    (expected,), _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, bos_token=BOS
    )
    with rendering_here():
        given = {"messages": messages, "bos_token": BOS}
        assert checkpoints.text.chat.render(Template(source, "here"), given) == expected


WRONG = [
    ("{% if true %}\n\n{{ oops }}{% endfor %}", "line 3: Encountered unknown tag 'endfor'"),
    ("a\n{% for %}", "line 2: "),
    ("a\n\n{{ raise_exception('roles must alternate') }}", "line 3: roles must alternate"),
    ("a\n{{ nobody.name }}", "line 2: 'nobody' is undefined"),
    ("{% macro m() %}\n{{ a.b.c }}{% endmacro %}\n\n{{ m() }}", "line 2: 'a' is undefined"),
    ("\n{{ messages[0].content.__class__.__mro__ }}", "line 2: access to attribute '__class__'"),
    ("{{ messages.append(1) }}", "line 1: access to attribute 'append' of 'list' object is unsafe"),
    ("{{ cycler.__init__.__globals__ }}", "line 1: access to attribute '__init__'"),
    ("{% set n = namespace(__x=1) %}", "line 1: a namespace may not hold the name '__x'"),
    ("{% set n = namespace() %}{% set n._x = 1 %}", "line 1: a namespace may not hold"),
    ("{{ dict.mro() }}", "line 1: 'function object' has no attribute 'mro'"),
    ("{% include '/etc/hostname' %}", "line 1: TypeError: no loader"),
    ("{% import 'os' as os %}", "line 1: TypeError: no loader"),
    ("{{ 1 / 0 }}", "line 1: ZeroDivisionError"),
    ("{{ 1 | shout }}", "line 1: No filter named 'shout'"),
    ("{{ range(10**9) }}", "line 1: OverflowError: Range too big"),
    ("{{ '\\ud800' }}", " UnicodeEncodeError"),
    ("{{ raise_exception('\\ud800' * 5000) }}", "line 1: " + r"\?" * 1000 + "$"),
    ("{{ " + "(" * 10**4 + " }}", " RecursionError"),
    ("{{ 'x' * 10**9 }}", "line 1: it needs more than 512 MB of memory"),
    ("{{ [1] * 10**8 }}", "line 1: it needs more than 512 MB of memory"),
    ("{{ 'x' * 10**7 }}", " the text grew beyond 4,194,304 characters"),
    ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", " the text grew beyond 4,194,304"),
]


@pytest.mark.parametrize(("source", "said"), WRONG, ids=[source[:40] for source, _ in WRONG])
def test_a_template_that_fails_is_named_with_its_line(tmp_path, source, said):
    path = write_chat(tmp_path, "byte level", source)
    with pytest.raises(CheckpointError, match=f"^{path / 'chat_template.jinja'}: ?{said}"):
        said_by(path)


def test_a_template_of_the_config_is_named_too(tmp_path):
    path = write_chat(tmp_path, "byte level", None, chat_template="\n{{ a.b }}")
    where = path / "tokenizer_config.json"
    with pytest.raises(CheckpointError, match=f"{where}: chat_template: line 2: 'a' is undef"):
        said_by(path)
    listed = [{"name": "a", "template": "{% x %}"}]
    edit_json(path / "tokenizer_config.json", chat_template=listed)
    with pytest.raises(CheckpointError, match=f"{where}: chat_template a: line 1: Encountered"):
        said_by(path, "a")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10**(10**10) }}",
    ],
)
def test_a_template_that_takes_too_long_is_stopped(monkeypatch, source):
    monkeypatch.setattr(checkpoints.text.chat, "MAX_SECONDS", 1.5)
    with pytest.raises(CheckpointError, match="^here: not done after 1.5 seconds"):
        render(Template(source, "here"), {})


def renderer(*, seconds: int, template: str, **options):
    request = {"seconds": seconds, "megabytes": 512, "characters": 99, "variables": {}}
    return subprocess.run(
        [sys.executable, "-I", str(checkpoints.text.chat.RENDERER)],
        input=json.dumps(request | {"template": template}).encode(),
        capture_output=True,
        **options,
    )


def test_a_renderer_that_nobody_stops_ends_by_itself():
    forever = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    done = renderer(seconds=1, template=forever, timeout=60)
    assert (done.returncode < 0, done.stdout) == (True, b"")


def test_the_renderer_gets_no_environment(monkeypatch, tmp_path):
    spy = tmp_path / "spy.py"
    spy.write_text("import json, os\nprint(json.dumps({'text': json.dumps(dict(os.environ))}))")
    monkeypatch.setenv("SECRET_OF_OURS", "x")
    monkeypatch.setattr(checkpoints.text.chat, "RENDERER", spy)
    assert "SECRET_OF_OURS" not in json.loads(render(Template("", "here"), {}))


def test_a_renderer_that_dies_is_an_error(monkeypatch, tmp_path):
    spy = tmp_path / "spy.py"
    spy.write_text("import sys\nsys.exit(3)")
    monkeypatch.setattr(checkpoints.text.chat, "RENDERER", spy)
    with pytest.raises(CheckpointError, match="^here: its process ended with code 3"):
        render(Template("", "here"), {})


def test_the_renderer_imports_little():
    tree = ast.parse(checkpoints.text.chat.RENDERER.read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert imported - sys.stdlib_module_names == {"jinja2"}
